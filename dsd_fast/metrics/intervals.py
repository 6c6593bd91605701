"""Confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["bootstrap", "wilson"]


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval (Wilson 1927) of a proportion, `right` of `n`; 95 % by default.

    Without any observation it is (0, 1).

    Raises:
        ValueError: `right` is not between 0 and `n`.
    """
    if not 0 <= right <= n:
        raise ValueError(f"right: got {right}, expected between 0 and n = {n}")
    if n == 0:
        return 0.0, 1.0
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[NDArray[Any]], ArrayLike],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The percentile bootstrap interval of a statistic (Efron and Tibshirani 1993, chapter 13).

    With clusters whole clusters are drawn with replacement, as many as there are (the cluster bootstrap, Davison and
    Hinkley 1997, section 3.8): observations that share an image are no independent evidence. An interval of few
    clusters is too narrow, and of observations that are all equal it has no width.

    Args:
        values: (n, …) observations along the first axis.
        statistic: of (m, …) observations, a number or an array of any shape, always the same; m is n unless clusters
            differ in size.
        clusters: n keys, equal ones for observations that are drawn together; None: each by itself.
        confidence: of the interval, 0 to 1.
        resamples: how many are drawn.
        seed: of the draws; equal arguments give equal intervals.

    Returns:
        The lower and the upper bound, float64, each of the statistic's shape.

    Raises:
        ValueError: no values, another number of clusters than values, or a confidence or a number of resamples outside
            of its range.
    """
    array = np.asarray(values)
    if array.ndim == 0 or not len(array):
        raise ValueError(f"values: got shape {array.shape}, expected at least one observation")
    if clusters is not None and len(clusters) != len(array):
        raise ValueError(f"clusters: got {len(clusters)}, expected one for each of {len(array)} values")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, expected a number between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples}, expected at least 1")
    members: dict[Hashable, list[int]] = {}
    for place, key in enumerate(range(len(array)) if clusters is None else clusters):
        members.setdefault(key, []).append(place)
    sizes = np.array([len(each) for each in members.values()])
    array = array[np.array([place for each in members.values() for place in each])]
    starts = np.cumsum(sizes) - sizes
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        chosen = draw.integers(len(sizes), size=len(sizes))
        many = sizes[chosen]
        # Each drawn cluster's places, one after another.
        places = np.arange(many.sum()) + np.repeat(starts[chosen] - (np.cumsum(many) - many), many)
        found.append(np.asarray(statistic(array[places]), np.float64))
    low, high = np.quantile(np.stack(found), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high
