"""From CLIP's space back to text states, in float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dsd_fast.image_prompt.config import LEAST

# Of embeddings with noise, which stand for images', to those of their captions. On the mini model's training scenes
# the choice is flat in it.
_COSINE = 0.9
# Cuts that are tried, and the least of them, of the largest singular value.
_CUTS, _LEAST = 32, 0.02


@dataclass(frozen=True, eq=False)
class Inverse:
    """States of embeddings z, up to their length: ``matrix`` z.

    Attributes:
        matrix: (E, D).
        cut: a singular value; None of a fitted map.
        kept: singular values that are not left out; None where all are weighed.
    """

    matrix: Tensor
    cut: float | None = None
    kept: int | None = None


Make = Callable[[float], Inverse]


def rounded(value: float) -> float:
    """Round what was measured to four digits, which are the same on every machine."""
    return float(f"{value:.4g}")


def truncated(projection: Tensor) -> Make:
    """Make pseudo-inverses of a projection (D, E) without the singular values up to a cut."""
    u, s, vh = torch.linalg.svd(projection, full_matrices=False)
    # Below it, what rounding left of 0.
    least = float(s[0]) * max(projection.shape) * torch.finfo(s.dtype).eps

    def make(cut: float) -> Inverse:
        keep = s > max(cut, least)
        return Inverse((vh[keep].mT / s[keep]) @ u[:, keep].mT, cut=cut, kept=int(keep.sum()))

    return make


def ridge(projection: Tensor) -> Make:
    """Make (WᵀW + cut² I)⁻¹ Wᵀ of a projection W (D, E)."""
    u, s, vh = torch.linalg.svd(projection, full_matrices=False)
    return lambda cut: Inverse((vh.mT * (s / (s**2 + cut**2)).nan_to_num()) @ u.mT, cut=cut)


def prior(projection: Tensor, states: Tensor) -> Make:
    """Make the state that is expected of an embedding with noise, of a projection W (D, E).

    M Wᵀ (W M Wᵀ + σ² I)⁺ with M the second moment of captions' states and σ² = cut² tr(M) / E. It is that about 0, not
    about the mean, for images' embeddings have another mean than texts'.

    Args:
        states: (M, E), of captions.
    """
    moment = states.mT @ states / len(states)
    values, vectors = torch.linalg.eigh(projection @ moment @ projection.mT)
    back = moment @ projection.mT @ vectors  # (E, D)
    # Below it, what rounding left.
    least = values[-1] * len(values) * torch.finfo(values.dtype).eps

    def make(cut: float) -> Inverse:
        noisy = values.clamp(min=0) + cut**2 * torch.trace(moment) / len(moment)
        return Inverse((back * torch.where(noisy > least, 1 / noisy, 0.0)) @ vectors.mT, cut=cut)

    return make


def fitted(embeds: Tensor, states: Tensor) -> Inverse:
    """Fit states (M, E) to embeddings (M, D) of unit length by least squares, as if these had noise.

    Noise of cosine c to what it is added to is a ridge of (1 / c² − 1) / D. As :func:`prior` it goes through 0.
    """
    seen = embeds.mT @ embeds / len(embeds)
    seen.diagonal().add_((_COSINE**-2 - 1) / embeds.shape[1])
    return Inverse(torch.linalg.solve(seen, embeds.mT @ states / len(embeds)).mT)


def best_cut(make: Make, projection: Tensor, states: Tensor) -> float:
    """Choose the cut of which inverses find captions' states (M, E) best, by cosine, from embeddings with noise."""
    largest = float(torch.linalg.svdvals(projection)[0])
    embeds = F.normalize(states @ projection.mT, dim=1)
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(embeds.shape, generator=generator, dtype=embeds.dtype, device="cpu")
    seen = F.normalize(embeds + noise * ((_COSINE**-2 - 1) / embeds.shape[1]) ** 0.5, dim=1)
    # What all states have in common is not to be found.
    centred = states - states.mean(0)

    def found(cut: float) -> float:
        result = F.normalize(seen @ make(cut).matrix.mT, dim=1) * states.norm(dim=1, keepdim=True)
        return float(F.cosine_similarity(result - states.mean(0), centred, dim=1).mean())

    cuts = [rounded(largest * math.pow(_LEAST, number / _CUTS)) for number in range(1, _CUTS + 1)]
    return max(cuts, key=found)


def held_out_quality(embeds: Tensor, states: Tensor) -> dict[str, float]:
    """Tell how well a map fitted to the other captions finds the states of one in eight of them.

    Returns:
        {"r2", "cosine"}: 1 − Σ|h − e|² / Σ|μ − e|² against the mean μ of the others, and the mean cosine of h − μ and
        e − μ.
    """
    out = torch.arange(len(states), device="cpu") % LEAST == 0
    mean = states[~out].mean(0)
    wanted = states[out] - mean
    got = embeds[out] @ fitted(embeds[~out], states[~out]).matrix.mT - mean
    return {
        "r2": 1 - float((got - wanted).square().sum() / wanted.square().sum()),
        "cosine": float(F.cosine_similarity(got, wanted, dim=1).mean()),
    }
