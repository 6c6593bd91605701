"""Where in an image each word of a caption is looked at: cross-attention maps (DAAM, Tang et al., arXiv 2210.04885).

    map(word)[y, x] = mean over timesteps, layers, heads and the word's tokens of upsampled softmax(Q Kᵀ / √D)[token]

As in DAAM, maps of all layers are upsampled to one size before they are averaged, and a word of several tokens is the
mean of its tokens' maps. What differs: the image is given, so its latents are noised at the matcher's timesteps, where
DAAM follows a generation; the layers are :func:`map_layers`' rather than all; the upsampling is bilinear rather than
bicubic with negative values cut off, so that values stay probabilities, which over all tokens of the text (begin, end
and padding tokens included) sum to 1 at every pixel; and nothing is normalised afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dsd_fast.engine import Noised, Texts, draw_noise
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.matching.score import PairScorer
from dsd_fast.matching.words import Span, find_spans, positions, words
from dsd_fast.models.offsets import token_offsets
from dsd_fast.models.prompts import token_limit
from dsd_fast.unet import Plan, UNetProgram
from dsd_fast.unet.step import Size
from dsd_fast.unet.stream import rows_at_once

Heatmap = tuple[str, Span, NDArray[np.float32]]
"""The characters, their (start, end) in the caption, and their (h, w) map."""


def map_layers(program: UNetProgram, layers: str | Sequence[str]) -> list[str]:
    """Score ids whose attention a heat map averages.

    Args:
        program: of the network.
        layers: "up-finest" (of the up part, the cross-attentions of the highest resolution), "all" (DAAM's choice), or
            score ids.

    Raises:
        ValueError: another string, or no layers; unknown ids are left to the plan, which names the nearest.
    """
    if layers == "all":
        return list(program.score_ids)
    if layers == "up-finest":
        levels = {step.name: step.level for step in program.steps if step.score and step.name.startswith("up-")}
        return [name for name, level in levels.items() if level == min(levels.values())]
    if isinstance(layers, str) or not len(layers):
        raise ValueError(f"layers: got {layers!r}, expected 'up-finest', 'all', or at least one score id")
    return list(layers)


def heatmaps(
    scorer: PairScorer,
    latent: Tensor,
    caption: str,
    spans: Sequence[str | Span] | None = None,
    layers: str | Sequence[str] = "up-finest",
) -> list[Heatmap]:
    """See :meth:`Matcher.heatmap`; ``latent`` is the image's, (1, C, h, w)."""
    wanted = words(caption) if spans is None else find_spans(caption, spans)
    tokens = _positions(scorer, caption, wanted)
    for start, end in wanted:
        if spans is not None and (start, end) not in tokens:
            raise ValueError(f"spans: the characters {caption[start:end]!r} at ({start}, {end}) have no tokens")
    if not tokens:
        return []
    chosen = sorted({token for own in tokens.values() for token in own})
    maps = _token_maps(scorer, latent, scorer.encode_texts([caption], unconditional=False), chosen, layers)
    place = {token: i for i, token in enumerate(chosen)}
    return [
        (caption[slice(*span)], span, maps[[place[token] for token in tokens[span]]].mean(0).numpy())
        for span in wanted
        if span in tokens
    ]


def check(scorer: PairScorer, captions: Sequence[str], layers: str | Sequence[str] = "up-finest") -> None:
    """See :meth:`Matcher.check_heatmaps`."""
    plan = _plan(scorer, layers)
    most, largest = 0, ""
    for caption in captions:
        found = len({token for own in _positions(scorer, caption, words(caption)).values() for token in own})
        if found > most:
            most, largest = found, caption
    budget = scorer.config.memory_budget
    if budget is None or not most:
        return
    # All captions have keys of one size; the rows of the one with the most maps are the largest.
    with torch.no_grad():
        text = scorer.encode_texts([largest], unconditional=False).keys(plan)
    size = scorer.engine.latent_size
    rows_at_once(plan, *size, text.tokens, keys=plan.text_bytes(text), map_tokens=most, memory_budget=budget)


def _positions(scorer: PairScorer, caption: str, spans: Sequence[Span]) -> dict[Span, list[int]]:
    """The token positions of each span that has some."""
    model = scorer.model
    offsets = token_offsets(model.tokenizers, caption, token_limit(model.tokenizers, model.text_encoders))
    return {span: own for span in spans if (own := positions(span, offsets))}


def _plan(scorer: PairScorer, layers: str | Sequence[str]) -> Plan:
    return scorer.engine.plan(maps=map_layers(scorer.program, layers))


def _token_maps(
    scorer: PairScorer, latent: Tensor, text: Texts, tokens: Sequence[int], layers: str | Sequence[str]
) -> Tensor:
    """(n, height, width) float32 on the CPU, the mean map of each token position of one text, at the image's size."""
    engine, steps = scorer.engine, len(scorer.timesteps)
    epsilon = draw_noise([scorer.config.seed], steps, latent.shape[1:])  # (1, S, C, h, w)
    noised = Noised.grid(scorer.model.schedule, upload(latent, scorer.model.device), epsilon, scorer.timesteps)
    plan, one = _plan(scorer, layers), torch.zeros(steps, dtype=torch.int64, device="cpu")
    # Bilinear upsampling is linear: it may wait until maps of one size have been added up.
    sums: dict[Size, Tensor] = {}
    device = scorer.model.device
    for _, out in engine.rows(plan, noised.latents, noised.timesteps, text, one, tokens=tokens):
        for value in out.maps.values():
            size: Size = (value.shape[2], value.shape[3])
            added = value.float().sum(0)
            sums[size] = sums[size] + added if size in sums else added
    total = torch.zeros(len(tokens), *engine.size, dtype=torch.float32, device=device)
    for value in sums.values():
        total += F.interpolate(value[None], size=engine.size, mode="bilinear", align_corners=False)[0]
    return (total / (len(plan.maps) * steps)).cpu()
