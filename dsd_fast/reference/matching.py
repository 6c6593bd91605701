"""The official DSD score of an image and a text (He et al., arXiv 2305.10722; code of eric-ai-lab/DSD).

At timestep t, with noise ε, noised latent z_t, and UNet rows for the empty text (u) and the caption (c):

    a_t = mean over six cross-attention layers, both rows, heads and positions of logsumexp_77(Q Kᵀ / √D)
    b_t = ‖ε − ε_u‖₂ − ‖ε − ε_c‖₂
    score = mean over t of (2 · attention_weight · a_t + noise_weight · b_t)

so the default weights give the official a_t + b_t, and `noise_weight=0` its `use_bias=False`.

Deviations, each from a defect of the official code: the VAE posterior's mean, not a sample without a seed, though still
encoded once per timestep; noise from a seed, not from a file in the home directory; each pair alone, unless
`batch_mean` asks for the official mean over the batch; v-predictions converted to ε before they are compared with it;
norms and log-sum-exps in float32.

Letters: N images, M captions, T timesteps, P latents of one UNet call, H heads, L positions, E text width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

SECTIONS = ("down", "mid", "up")
PIL_BICUBIC = 3


@torch.no_grad()
def score(
    pipe: DiffusionPipeline,
    images: Sequence[Any],
    captions: Sequence[str],
    *,
    timesteps: int | Sequence[int] = 10,
    attention_weight: float = 0.5,
    noise_weight: float = 1.0,
    seed: int = 0,
    latents: Tensor | None = None,
    noise: Tensor | None = None,
    batch_mean: bool = False,
) -> Tensor:
    """Scores every image with every caption, pair by pair.

    A pair costs one text-encoder call of 2 rows, T VAE encodes of 1 image and T UNet calls of 2 rows.

    Args:
        pipe: stock StableDiffusionPipeline (SD 1.x or 2.x, ε- or v-prediction) or StableDiffusionXLPipeline.
        images: N PIL images, uint8 arrays (height, width, 3), or float tensors (3, height, width) in [0, 1], which
            are rounded to 8 bits; Pillow's bicubic resize brings them to the pipeline's size.
        captions: M texts.
        timesteps: how many, on the official grid of :func:`official_timesteps`, or the timesteps themselves.
        attention_weight: of the attention part; 0.5 is official, since a_t already averages over two rows.
        noise_weight: of the noise-prediction part.
        seed: of the noise; noise k is used at the k-th timestep, the same for every image and caption.
        latents: scaled clean latents (N, C, h, w); given these, no image is read and nothing is encoded.
        noise: (T, C, h, w) instead of the seed's.
        batch_mean: all N images go with one caption through one call of 2N rows, and the attention part is their
            mean, shared by all N, as in the official evaluation, where a pair's score depends on its batch.

    Returns:
        (N, M) float32 on the CPU; higher is a better match.

    Raises:
        ValueError: an argument that does not fit the pipeline, with its name, what was given and what was expected.
    """
    unet = pipe.unet
    steps = _timesteps(pipe, timesteps)
    if latents is None:
        pixels = _preprocess(pipe, images)
        shape = (unet.config.in_channels, *(side // pipe.vae_scale_factor for side in pixels.shape[-2:]))
    else:
        latents = latents.to(unet.device, torch.float32)
        shape = tuple(latents.shape[1:])
    if noise is None:
        noise = torch.stack([_draw(seed, k, shape) for k in range(len(steps))])
    elif tuple(noise.shape) != (len(steps), *shape):
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected {(len(steps), *shape)}")
    noise = noise.to(unet.device, torch.float32)
    alphas = pipe.scheduler.alphas_cumprod.to(unet.device, torch.float32)

    count = len(pixels) if latents is None else len(latents)
    groups = [slice(0, count)] if batch_mean else [slice(n, n + 1) for n in range(count)]
    scores = torch.zeros(count, len(captions))
    with _recording(unet, SECTIONS) as lse, _upcast_vae(pipe.vae):
        for group in groups:
            for m, caption in enumerate(captions):
                text, pooled = _encode_text(pipe, caption)
                total = torch.zeros((), device=unet.device)
                for k, t in enumerate(steps):
                    clean = _encode_images(pipe.vae, pixels[group]) if latents is None else latents[group]
                    noised = alphas[t].sqrt() * clean + (1 - alphas[t]).sqrt() * noise[k]
                    attention, gain = _terms(
                        unet,
                        noised,
                        t,
                        noise[k],
                        text[:1],
                        text[1:],
                        lse,
                        alpha=alphas[t] if pipe.scheduler.config.prediction_type == "v_prediction" else None,
                        conditions=_added_conditions(pipe, pooled, noised),
                    )
                    if batch_mean:
                        attention = attention.mean()
                    total = total + 2 * attention_weight * attention + noise_weight * gain
                scores[group, m] = (total / len(steps)).cpu()
    return scores


@torch.no_grad()
def pair_terms(
    unet: UNet2DConditionModel,
    latents: Tensor,
    timestep: int,
    noise: Tensor,
    uncond: Tensor,
    cond: Tensor,
    *,
    sections: Sequence[str] = SECTIONS,
) -> tuple[Tensor, Tensor]:
    """Attention and noise-prediction parts of the score of P pairs at one timestep.

    Args:
        unet: SD 1.x or 2.x UNet that predicts the noise.
        latents: (P, C, h, w), already noised.
        timestep: at which they were.
        noise: that the predictions are compared with, (P, C, h, w) or (C, h, w).
        uncond: states of the empty text, (1, 77, E) or (P, 77, E).
        cond: states of the captions, (1, 77, E) or (P, 77, E).
        sections: of the UNet whose layers count, from "down", "mid", "up".

    Returns:
        a_t and b_t, each (P,) float32.
    """
    with _recording(unet, sections) as lse:
        return _terms(unet, latents, timestep, noise, uncond, cond, lse)


def official_timesteps(count: int, train_timesteps: int = 1000) -> list[int]:
    """The official grid: every int(1000 / count)-th of the schedule's timesteps 989, 988, … 10, ascending.

    Not always `count` of them, as in the official code: 50 gives 49, since the ends of the schedule are left out.

    Raises:
        ValueError: `count` is not between 1 and `train_timesteps`.
    """
    if not 1 <= count <= train_timesteps:
        raise ValueError(f"timesteps: got {count}, expected a count from 1 to {train_timesteps}")
    indices = range(10, train_timesteps - 10, train_timesteps // count)
    return sorted(train_timesteps - 1 - index for index in indices)


def _terms(
    unet: UNet2DConditionModel,
    latents: Tensor,
    timestep: int,
    noise: Tensor,
    uncond: Tensor,
    cond: Tensor,
    lse: list[Tensor],
    *,
    alpha: Tensor | None = None,
    conditions: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`pair_terms`; `alpha` is ᾱ_t of a v-prediction, `lse` what :func:`_recording` fills."""
    pairs = len(latents)
    text = torch.cat([uncond.expand(pairs, -1, -1), cond.expand(pairs, -1, -1)]).to(unet.dtype)
    lse.clear()
    predicted = unet(
        torch.cat([latents, latents]).to(unet.dtype),
        timestep,
        encoder_hidden_states=text,
        added_cond_kwargs=conditions,
        return_dict=False,
    )[0].float()
    if alpha is not None:
        predicted = alpha.sqrt() * predicted + (1 - alpha).sqrt() * torch.cat([latents, latents])
    # (layers, rows) → the mean over layers and over a pair's two rows.
    attention = torch.stack(lse).mean(0).view(2, pairs).mean(0)
    errors = (noise - predicted.view(2, pairs, *latents.shape[1:])).flatten(2).norm(dim=-1)
    return attention, errors[0] - errors[1]


def _score_layers(unet: UNet2DConditionModel, sections: Sequence[str]) -> list[Attention]:
    """attn2 of the last transformer block of every `attn_i` in the last block with cross-attention of each section."""
    blocks = {"down": unet.down_blocks, "mid": [unet.mid_block], "up": unet.up_blocks}
    layers = []
    for section in sections:
        with_attention = [
            transformers
            for block in blocks[section]
            if (transformers := [m for m in getattr(block, "attentions", []) if isinstance(m, Transformer2DModel)])
        ]
        layers += [transformer.transformer_blocks[-1].attn2 for transformer in (with_attention or [[]])[-1]]
    if not layers:
        raise ValueError(f"sections: got {tuple(sections)}, in which this UNet has no cross-attention")
    return layers


@contextmanager
def _recording(unet: UNet2DConditionModel, sections: Sequence[str]) -> Iterator[list[Tensor]]:
    """Inside, every UNet call appends to the list, per score layer, the mean log-sum-exp of each row: (rows,)."""
    recorded: list[Tensor] = []
    layers = _score_layers(unet, sections)
    originals = [layer.processor for layer in layers]
    for original in originals:
        if type(original) not in (AttnProcessor, AttnProcessor2_0):
            raise ValueError(f"pipe: its attention processor {type(original).__name__} computes something else")
    try:
        for layer in layers:
            layer.set_processor(_RecordingProcessor(recorded.append))
        yield recorded
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.set_processor(original)


class _RecordingProcessor:
    """Cross-attention with its scores written out, (rows · H, L, 77), as the official `get_attention_scores`."""

    def __init__(self, record: Callable[[Tensor], None]) -> None:
        self.record = record

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        if attn.upcast_attention:
            query, key = query.float(), key.float()
        scores = attn.scale * (query @ key.transpose(-1, -2))
        self.record(scores.float().logsumexp(-1).view(len(hidden_states), -1).mean(-1))
        probabilities = (scores.float() if attn.upcast_softmax else scores).softmax(-1).to(value.dtype)
        output: Tensor = attn.batch_to_head_dim(probabilities @ value)
        for layer in attn.to_out:
            output = layer(output)
        return output


def _timesteps(pipe: DiffusionPipeline, timesteps: int | Sequence[int]) -> list[int]:
    train_timesteps = pipe.scheduler.config.num_train_timesteps
    prediction_type = pipe.scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"pipe: its prediction_type is {prediction_type!r}, expected 'epsilon' or 'v_prediction'")
    if isinstance(timesteps, int):
        return official_timesteps(timesteps, train_timesteps)
    steps = [int(t) for t in timesteps]
    if not steps or not all(0 <= t < train_timesteps for t in steps):
        raise ValueError(f"timesteps: got {steps}, expected at least one, each from 0 to {train_timesteps - 1}")
    return steps


def _draw(seed: int, k: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of the k-th timestep, float32 on the CPU: it depends on (seed, k) alone."""
    state = np.random.SeedSequence([seed, k]).generate_state(1, np.uint64)[0]
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(state >> np.uint64(1))))


def _preprocess(pipe: DiffusionPipeline, images: Sequence[Any]) -> Tensor:
    """(N, 3, height, width) float32 in [−1, 1] at the UNet's size, on its device; the aspect ratio is not kept."""
    sample = pipe.unet.config.sample_size
    sides = (sample, sample) if isinstance(sample, int) else tuple(sample)
    height, width = (side * pipe.vae_scale_factor for side in sides)
    if len(images) == 0:
        raise ValueError("images: got none, expected at least one")
    pixels = []
    for image in images:
        if isinstance(image, Tensor):
            image = image.detach().cpu().permute(1, 2, 0).float().numpy()
        elif isinstance(image, np.ndarray):
            image = image / 255
        if isinstance(image, np.ndarray):
            image = VaeImageProcessor.numpy_to_pil(image)[0]
        array = np.array(image.convert("RGB").resize((width, height), PIL_BICUBIC))
        pixels.append(2 * (torch.from_numpy(array).permute(2, 0, 1).float() / 255) - 1)
    return torch.stack(pixels).to(pipe.unet.device)


def _encode_images(vae: Any, pixels: Tensor) -> Tensor:
    """Scaled posterior means, (P, C, h, w) float32."""
    latents: Tensor = vae.config.scaling_factor * vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    return latents.float()


def _encode_text(pipe: DiffusionPipeline, caption: str) -> tuple[Tensor, Tensor | None]:
    """Text states (2, 77, E) of the empty text and the caption, and SDXL's pooled states (2, width) or None."""
    if not hasattr(pipe, "text_encoder_2"):
        return pipe.text_encoder(_tokenize(pipe, pipe.tokenizer, caption).to(pipe.text_encoder.device))[0], None
    states = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        output = encoder(_tokenize(pipe, tokenizer, caption).to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
    text, pooled = torch.cat(states, dim=-1), output[0]
    if pipe.config.force_zeros_for_empty_prompt:
        text[0], pooled[0] = 0, 0
    return text, pooled


def _tokenize(pipe: DiffusionPipeline, tokenizer: Any, caption: str) -> Tensor:
    length = tokenizer.model_max_length
    caption = pipe.maybe_convert_prompt(caption, tokenizer)
    ids = tokenizer(["", caption], padding="max_length", max_length=length).input_ids
    if len(ids[1]) > length:
        raise ValueError(f"captions: {caption!r} has {len(ids[1])} tokens, expected at most {length}")
    return torch.tensor(ids)


def _added_conditions(pipe: DiffusionPipeline, pooled: Tensor | None, latents: Tensor) -> dict[str, Tensor] | None:
    """SDXL's pooled text and image sizes for 2P rows: original size, no crop, target size, all the latents' own."""
    if pooled is None:
        return None
    size = [side * pipe.vae_scale_factor for side in latents.shape[-2:]]
    time_ids = torch.tensor([*size, 0, 0, *size], device=latents.device, dtype=pipe.unet.dtype)
    return {
        "text_embeds": pooled.repeat_interleave(len(latents), 0).to(pipe.unet.dtype),
        "time_ids": time_ids.repeat(2 * len(latents), 1),
    }


@contextmanager
def _upcast_vae(vae: Any) -> Iterator[None]:
    """float32 for a VAE that overflows in float16 (SDXL's), as the stock pipeline does; exact in both directions."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype)
