"""How often, and how high, the right candidate is ranked: R@k, median rank, Winoground scores.

A candidate that scores as much as the right one, or that has no comparable score (NaN), stands before it: a model that
gives all candidates one score is right about none of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Winoground", "mean_reciprocal_rank", "median_rank", "ranks", "recall_at", "winoground"]


def ranks(scores: ArrayLike, label: ArrayLike, *, ties: str = "wrong") -> NDArray[np.int64]:
    """The rank of the right candidate, 1 for the best.

    Args:
        scores: (…, K), higher is better; a NaN of any candidate stands before the right one, and a right candidate
            that is NaN is last.
        label: position of the right candidate, one for all or (…).
        ties: "wrong", 1 + the number of others that score as much or more; or "right", 1 + the number of those that
            score more, which is argmax's rule where the right candidate comes first.

    Returns:
        (…) int64, from 1 to K.

    Raises:
        ValueError: no candidates, a label that is not the position of one, or another name for ties.
    """
    if ties not in ("wrong", "right"):
        raise ValueError(f"ties: got {ties!r}, expected 'wrong' or 'right'")
    values, places = np.asarray(scores), np.asarray(label)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"scores: got shape {values.shape}, expected candidates along the last axis")
    if not np.issubdtype(places.dtype, np.integer) or ((places < 0) | (places >= values.shape[-1])).any():
        raise ValueError(f"label: got {label!r}, expected integers from 0 to {values.shape[-1] - 1}")
    try:
        places = np.broadcast_to(places, values.shape[:-1])[..., None]
    except ValueError:
        raise ValueError(f"label: got shape {places.shape}, expected one or {values.shape[:-1]}") from None
    right = np.take_along_axis(values, places, -1)
    # Not >= or >, which no NaN satisfies.
    before = ~(values < right) if ties == "wrong" else ~(values <= right)
    np.put_along_axis(before, places, False, -1)
    return np.asarray(1 + before.sum(-1, dtype=np.int64))


def recall_at(rank: ArrayLike, k: int) -> float:
    """R@k, the share of ranks that are at most k; with k = 1 the accuracy.

    Args:
        rank: of each query, from 1, of any shape.
        k: at least 1.

    Raises:
        ValueError: no ranks, a rank below 1, or a k below 1.
    """
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1")
    return float((_ranks(rank) <= k).mean())


def median_rank(rank: ArrayLike) -> float:
    """The median of ranks; of an even number the mean of the middle two.

    Raises:
        ValueError: no ranks, or a rank below 1.
    """
    return float(np.median(_ranks(rank)))


def mean_reciprocal_rank(rank: ArrayLike) -> float:
    """The mean of 1 / rank (MRR).

    Raises:
        ValueError: no ranks, or a rank below 1.
    """
    return float((1 / _ranks(rank)).mean())


class Winoground(NamedTuple):
    """Which groups are right, each (…) bool.

    Attributes:
        text: each image scores highest with its own text.
        image: each text scores highest with its own image.
        group: both.
    """

    text: NDArray[np.bool_]
    image: NDArray[np.bool_]
    group: NDArray[np.bool_]


def winoground(scores: ArrayLike, *, ties: str = "wrong") -> Winoground:
    """The text, image and group score of Winoground (Thrush et al. 2022, equations 1 to 3), for n ≥ 2 of each.

    Args:
        scores: (…, n, n), image i with text j at [i, j]; text i belongs to image i.
        ties: "wrong", the paper's strict inequalities; or "right". A NaN makes wrong what it is compared in.

    Raises:
        ValueError: another shape, or another name for ties.
    """
    values = np.asarray(scores)
    if values.ndim < 2 or values.shape[-1] != values.shape[-2] or values.shape[-1] < 2:
        raise ValueError(f"scores: got shape {values.shape}, expected (…, n, n) with n of at least 2")
    own = np.arange(values.shape[-1])
    text = (ranks(values, own, ties=ties) == 1).all(-1)
    image = (ranks(values.swapaxes(-1, -2), own, ties=ties) == 1).all(-1)
    return Winoground(np.asarray(text), np.asarray(image), np.asarray(text & image))


def _ranks(rank: ArrayLike) -> NDArray[Any]:
    array = np.asarray(rank)
    if not array.size:
        raise ValueError("rank: got none, expected at least one")
    if not (array >= 1).all():
        raise ValueError(f"rank: got {array.min()}, expected at least 1")
    return array
