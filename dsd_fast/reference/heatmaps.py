"""Heat maps of a caption's words on an image, after DAAM (Tang et al., arXiv 2210.04885; code of castorini/daam).

    map(word)[y, x] = mean over timesteps, layers, heads and the word's tokens of upsampled softmax(Q Kᵀ / √D)[token]

where the network sees the image's latents, noised at each timestep, and the caption. Deviations from DAAM: the image is
given, not generated; of the layers those of the up part with the highest resolution by default, not all; bilinear
upsampling, not bicubic with negative values cut off, so that the values of all tokens sum to 1; no normalisation.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from numpy.typing import NDArray
from torch import Tensor

from dsd_fast.reference.inputs import (
    added_conditions,
    draw_noise,
    encode_images,
    encode_text,
    preprocess,
    resolve_timesteps,
    upcast_vae,
)
from dsd_fast.reference.recording import MapProcessor, picture, recording

JOINERS = "'’-‐‑_."


@torch.no_grad()
def heatmap(
    pipe: DiffusionPipeline,
    image: Any,
    caption: str,
    *,
    spans: Sequence[str | tuple[int, int]] | None = None,
    layers: str | Sequence[str] = "up-finest",
    timesteps: int | Sequence[int] = 10,
    seed: int = 0,
    latents: Tensor | None = None,
    noise: Tensor | None = None,
) -> list[tuple[str, tuple[int, int], NDArray[np.float32]]]:
    """One map per word, or per span, timestep by timestep, all attention probabilities written out.

    Args:
        pipe: stock StableDiffusionPipeline (SD 1.x or 2.x) or StableDiffusionXLPipeline.
        image: a PIL image, a uint8 array (height, width, 3) or a float tensor (3, height, width) in [0, 1].
        caption: one text.
        spans: phrases, or (start, end) of characters that begin and end with words, instead of all words.
        layers: "up-finest", "all", or module paths such as "mid_block.attentions.0.transformer_blocks.0.attn2".
        timesteps: a count on the official grid, or the timesteps.
        seed: of the noise; noise k is used at the k-th timestep.
        latents: scaled clean latents (1, C, h, w); given these, no image is read.
        noise: (T, C, h, w) instead of the seed's.

    Returns:
        [(characters, (start, end), (height, width) float32 array), …] at the size of the image the network sees.

    Raises:
        ValueError: an argument that does not fit the pipeline, by name.
    """
    unet = pipe.unet
    steps = resolve_timesteps(pipe, timesteps)
    if latents is None:
        with upcast_vae(pipe.vae):
            latents = encode_images(pipe.vae, preprocess(pipe, [image]))
    latents = latents.to(unet.device, torch.float32)
    if noise is None:
        noise = torch.stack([draw_noise(seed, k, tuple(latents.shape[1:])) for k in range(len(steps))])
    text, pooled = encode_text(pipe, caption, slice(1, 2))
    alphas = pipe.scheduler.alphas_cumprod.to(unet.device, torch.float32)
    sides = [side * pipe.vae_scale_factor for side in latents.shape[-2:]]
    # (77, height, width), as (T, h, w) of each layer comes.
    total = torch.zeros(text.shape[1], *sides, device=unet.device, dtype=torch.float32)
    with recording(_modules(unet, layers), MapProcessor) as recorded:
        for k, t in enumerate(steps):
            noised = alphas[t].sqrt() * latents + (1 - alphas[t]).sqrt() * noise[k].to(unet.device)
            recorded.clear()
            unet(
                noised.to(unet.dtype),
                t,
                encoder_hidden_states=text.to(unet.dtype),
                added_cond_kwargs=added_conditions(pipe, pooled, noised),
            )
            for probabilities in recorded:
                rows = picture(probabilities.float().mean(1), latents.shape[-2:])  # (1, 77, h, w)
                total += torch.nn.functional.interpolate(rows, size=sides, mode="bilinear")[0]
    total = (total / (len(recorded) * len(steps))).cpu()
    return [
        (caption[start:end], (start, end), total[slice(*_tokens(pipe, caption, start, end))].mean(0).numpy())
        for start, end in (_words(caption) if spans is None else _spans(caption, spans))
    ]


def _words(caption: str) -> list[tuple[int, int]]:
    """Runs of anything but white space, punctuation and control characters; joiners within a word are part of it."""
    kinds = [unicodedata.category(c) for c in caption]
    apart = [kind[0] in "PZ" or kind == "Cc" for kind in kinds]
    inner = [
        0 < i < len(caption) - 1 and c in JOINERS and not apart[i - 1] | apart[i + 1] for i, c in enumerate(caption)
    ]
    # f a formatting character, x what can be read, m a mark.
    codes = {"Cf": "f", **{kind: "x" for kind in kinds if kind[0] in "LNS"}}
    plain = "".join(
        " " if apart[i] and not inner[i] else "x" if apart[i] else codes.get(kind, "m") for i, kind in enumerate(kinds)
    )
    found = [match.span() for match in re.finditer("[xm](?:[xmf]*[xm])?", plain)]
    return [(a, b) for a, b in found if any(kind[0] in "LNS" for kind in kinds[a:b])]


def _spans(caption: str, spans: Sequence[str | tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for span in spans:
        if not isinstance(span, str):
            found.append(span)
            continue
        phrase = r"\s+".join(map(re.escape, span.split()))
        places = [match.span() for match in re.finditer(rf"(?<!\w){phrase}(?!\w)", caption, re.IGNORECASE)]
        if not places:
            raise ValueError(f"spans: {span!r} is not in the caption {caption!r}")
        found += places
    return found


def _tokens(pipe: DiffusionPipeline, caption: str, start: int, end: int) -> tuple[int, int]:
    """First token of a word and the one after its last: as many as the texts before it, and up to its end, have."""
    tokenizer = pipe.tokenizer
    texts = [pipe.maybe_convert_prompt(text, tokenizer) for text in (caption[:start], caption[:end])]
    # Without the end token; the begin token is position 0.
    first, stop = (len(tokenizer(text).input_ids) - 1 for text in texts)
    return first, stop


def _modules(unet: Any, layers: str | Sequence[str]) -> list[Attention]:
    paths = [path for path, _ in unet.named_modules() if path.endswith(".attn2")]
    if layers == "up-finest":
        # The up part's resolution grows from block to block.
        last = max(path.split(".")[1] for path in paths if path.startswith("up_blocks."))
        paths = [path for path in paths if path.startswith(f"up_blocks.{last}.")]
    elif layers != "all":
        if isinstance(layers, str) or not set(layers) <= set(paths):
            raise ValueError(f"layers: got {layers!r}, expected 'up-finest', 'all' or of {paths}")
        paths = list(layers)
    return [unet.get_submodule(path) for path in paths]
