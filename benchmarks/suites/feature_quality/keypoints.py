"""Keypoints of an object found again on another of the same shape: nearest neighbours by cosine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.suites.feature_quality.conditions import GRID, Features
from benchmarks.suites.feature_quality.data import KEYPOINTS, Pair
from dsd_fast.metrics import box_extents, correct_keypoints
from dsd_fast.models.mini.scenes import IMAGE_SIZE

__all__ = ["chance", "correct", "find", "points", "upsampling"]

_AT_ONCE = 25


@cache
def upsampling(side: int = IMAGE_SIZE, grid: int = GRID) -> Tensor:
    """(side, grid): what bilinear enlargement makes of a line of ``grid`` values."""
    return F.interpolate(torch.eye(grid)[None], side, mode="linear", align_corners=False)[0].T.contiguous()


def points(pairs: Sequence[Pair], target: bool) -> NDArray[np.float64]:
    """(P, 5, 2) true keypoints (x, y) of one side of the pairs."""
    objects = [pair.to if target else pair.of for pair in pairs]
    return np.array([[item.keypoints[name] for name in KEYPOINTS] for item in objects])


def find(features: Features, pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """(P, 5, 2) points (x, y) of the targets, the centres of the pixels most like the source's keypoints.

    The likeness of two pixels is the cosine of their features, which are maps enlarged to the picture's size (bilinear)
    and L2-normalised there. Enlarging is linear: inner products are found on the small maps and enlarged after, and
    so are the norms, from the inner products of neighbours.
    """
    enlarge, places, weights = upsampling(), *_neighbours()
    where = torch.from_numpy(points(pairs, target=False)).float()
    found = []
    for start in range(0, len(pairs), _AT_ONCE):
        some = pairs[start : start + _AT_ONCE]
        source = features.grid([pair.source for pair in some])
        target = features.grid([pair.target for pair in some]).flatten(2)
        # Positions from -1 to 1; the border goes on outside, as in the enlargement.
        at = 2 * where[start : start + _AT_ONCE] / IMAGE_SIZE - 1
        queries = F.grid_sample(source, at[:, :, None], padding_mode="border", align_corners=False)[..., 0]
        alike = (queries.mT @ target).view(len(some), -1, GRID, GRID)
        alike = torch.einsum("ya,xb,pkab->pkyx", enlarge, enlarge, alike).flatten(2)
        gram = (target.mT @ target).flatten(1)
        norm = (gram[:, places] * weights).sum(-1).clamp_min(1e-12).sqrt()
        best = (alike / norm[:, None]).argmax(2)
        found.append(torch.stack((best % IMAGE_SIZE, best // IMAGE_SIZE), -1) + 0.5)
    return torch.cat(found).double().numpy()


@cache
def _neighbours() -> tuple[Tensor, Tensor]:
    """Places in a flat Gram matrix (256², of a map's positions) of the 16 products of each pixel's four neighbours,
    and their weights, both (4096, 16)."""
    enlarge = torch.einsum("ya,xb->yxab", upsampling(), upsampling()).reshape(IMAGE_SIZE**2, GRID**2)
    weights, places = enlarge.topk(4, 1)
    products = places[:, :, None] * GRID**2 + places[:, None]
    return products.flatten(1), (weights[:, :, None] * weights[:, None]).flatten(1)


def correct(found: NDArray[np.float64], pairs: Sequence[Pair], alpha: float, box: bool) -> NDArray[np.bool_]:
    """(P, 5): whether points lie within α of the target object's box, or of the picture, from the true ones."""
    extents = box_extents([pair.to.box for pair in pairs]) if box else np.array([IMAGE_SIZE, IMAGE_SIZE])
    return correct_keypoints(found, points(pairs, target=True), extents, alpha)


def chance(pairs: Sequence[Pair], alpha: float, box: bool) -> float:
    """The share of keypoints that a pixel drawn at random finds."""
    y, x = np.divmod(np.arange(IMAGE_SIZE**2), IMAGE_SIZE)
    pixels = np.stack((x, y), -1) + 0.5
    true = points(pairs, target=True)
    extents = box_extents([pair.to.box for pair in pairs]) if box else np.full((len(pairs), 2), IMAGE_SIZE)
    shares = [
        correct_keypoints(
            np.broadcast_to(pixels[:, None], (len(pixels), *each.shape)),
            np.broadcast_to(each, (len(pixels), *each.shape)),
            extent,
            alpha,
        ).mean()
        for each, extent in zip(true, extents, strict=True)
    ]
    return float(np.mean(shares))
