"""The terms of the pairs of a call, and their official sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsd_fast.compat.inputs import Pictures, Texts
from dsd_fast.matching.pairs import side_by_side
from dsd_fast.matching.score import PairScorer, Terms

Generators = torch.Generator | Sequence[torch.Generator] | None


def terms(
    scorer: PairScorer,
    pictures: Pictures,
    texts: Texts,
    free: Texts | None,
    *,
    epsilon: Tensor | None,
    sample: bool,
    generator: Generators,
) -> Terms:
    """Compute the (B, S) terms of B pairs: pair b is prompt b and image b modulo the number of images.

    Args:
        free: texts of the unconditional rows; None for none.
        epsilon: (S, C, h, w) noise; None leaves it to the scorer's seed.
        sample: draw from the VAE's posterior at each timestep.
        generator: of those draws, one, or one per image.
    """
    pairs = len(texts.of)
    image_of = pictures.of.repeat(pairs // len(pictures.of))
    names = ["attention", "error"] + (["free_attention", "free_error"] if free is not None else [])
    whole = {name: torch.empty(pairs, len(scorer.timesteps), dtype=torch.float64, device="cpu") for name in names}
    sampled = _sampled(scorer, pictures, generator) if sample else None
    free_of = torch.zeros(pairs, dtype=torch.int64, device="cpu") if free is None else free.of
    for number in torch.unique(free_of).tolist():
        encoded = scorer.texts(texts.states, None if free is None else free.states[number : number + 1])
        chosen = torch.nonzero(free_of == number).flatten()
        images, places = torch.unique(image_of[chosen], return_inverse=True)
        pairs_of, at_once = side_by_side(places), scorer.images_together(encoded, -(-len(chosen) // len(images)))
        for start in range(0, len(images), at_once):
            shown, own = images[start : start + at_once], pairs_of(start, start + at_once)
            if sampled is None:
                latents = scorer.engine.encode_images(list(pictures.pixels(shown.tolist())))
            else:
                latents = sampled[shown]
            rows = chosen[own]
            part = scorer.begin(latents, encoded, places[own] - start, texts.of[rows], epsilon=epsilon).done()
            for name, value in whole.items():
                value[rows] = getattr(part, name)
    return Terms(**whole)


def combined(found: Terms, *, use_bias: bool, free_attention: bool, batch_mean: bool, dtype: torch.dtype) -> Tensor:
    """The (B, S) official scores a + b, or (1, S) where all of it is shared by the batch; every sum in ``dtype``.

    Source: `forward` of the official `unet_2d_condition.py`.
    """
    attention = found.attention
    if found.free_attention is not None:
        # Half of the text's row where the other half is left out, so that texts rank the same.
        attention = (attention + (found.free_attention if free_attention else 0)) / 2
    if batch_mean:
        attention = attention.mean(0, keepdim=True)
    score = attention.to(dtype)
    if use_bias:
        assert found.free_error is not None
        score = score + (found.free_error.to(dtype) - found.error.to(dtype))
    return score


def _sampled(scorer: PairScorer, pictures: Pictures, generator: Generators) -> Tensor:
    """(n, S, C, h, w) posterior samples, drawn in the official order: at each timestep all images."""
    pixels, model = pictures.pixels(range(len(pictures))), scorer.model
    if generator is None or isinstance(generator, torch.Generator):
        draws = [model.encode_images(pixels, sample=True, generator=generator) for _ in scorer.timesteps]
        return torch.stack(draws, dim=1)
    if len(generator) != len(pixels):
        raise ValueError(f"generator: got {len(generator)}, expected one, or one for each of {len(pixels)} images")
    draws = [
        torch.cat([model.encode_images(one[None], sample=True, generator=own) for _ in scorer.timesteps])
        for one, own in zip(pixels, generator, strict=True)
    ]
    return torch.stack(draws)
