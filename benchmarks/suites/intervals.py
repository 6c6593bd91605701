"""Intervals of what several runs, or fits, gave on the same scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Statistic", "interval", "mean", "over_runs"]

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def mean(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gives (m,) means as they are: the statistic of one number a run and scene."""
    return means


def interval(
    values: NDArray[Any], statistic: Statistic = mean, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Gives a statistic of the mean over runs and scenes, with its 95 % percentile interval.

    Runs and scenes are both drawn with replacement: the pigeonhole bootstrap (Owen 2007), for observations that share
    a run or a scene.

    Args:
        values: (runs, n, …) of each run and scene.
        statistic: (m, …) means → (m,) numbers.
        resamples: how many are drawn.
        seed: of the draws.

    Returns:
        The value and the interval's bounds, which are widened where they leave the value outside.
    """
    runs, n = values.shape[:2]
    draw = np.random.default_rng(seed)
    of_runs = draw.multinomial(runs, np.full(runs, 1 / runs), resamples) / runs
    of_scenes = draw.multinomial(n, np.full(n, 1 / n), resamples) / n
    rows = values.astype(np.float64)
    each = np.stack([of_scenes @ run.reshape(n, -1) for run in rows])
    means = np.einsum("mr,rmf->mf", of_runs, each).reshape(resamples, *values.shape[2:])
    value = float(statistic(rows.mean((0, 1))[None])[0])
    low, high = np.quantile(statistic(means), [0.025, 0.975])
    return value, min(float(low), value), max(float(high), value)


def over_runs(
    values: Sequence[float], intervals: Sequence[Sequence[float]], resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Gives the mean of what several runs gave, with its 95 % percentile interval.

    Runs are drawn with replacement, and within each a value from the normal distribution of its own 95 % interval.

    Args:
        values: of each run.
        intervals: (low, high) of each, over its observations.
        resamples: how many are drawn.
        seed: of the draws.

    Returns:
        The mean and the interval's bounds, which are widened where they leave the mean outside.
    """
    draw = np.random.default_rng(seed)
    own, deviations = np.asarray(values), np.diff(np.asarray(intervals))[:, 0] / (2 * 1.96)
    chosen = draw.integers(len(own), size=(resamples, len(own)))
    means = (own[chosen] + deviations[chosen] * draw.standard_normal(chosen.shape)).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    value = float(own.mean())
    return value, min(float(low), value), max(float(high), value)
