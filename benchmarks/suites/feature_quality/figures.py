"""The figures of a condition: each task, and how far each is from plain features."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.suites.feature_quality import keypoints
from benchmarks.suites.feature_quality.conditions import Condition, base
from benchmarks.suites.feature_quality.data import Pair, Size
from benchmarks.suites.feature_quality.outcomes import Outcome, outcome, paired
from benchmarks.suites.feature_quality.probes import CHANCE
from benchmarks.suites.intervals import Statistic, interval, mean
from dsd_fast.bench.case import Context, Figure
from dsd_fast.metrics import mean_iou
from dsd_fast.models.mini.scenes import SHAPES

__all__ = ["ALPHAS", "SIZE", "gains", "measured", "tasks"]

SIZE = Size()
ALPHAS = (5, 10, 20)
"""Per cent; 10 is PCK@0.1."""
_WHOLES = ("box", "image")


def measured(condition: Condition, context: Context, *, size: Size = SIZE) -> list[Figure]:
    """All figures of a condition."""
    own = outcome(context, condition, size)
    figures = [*_keypoints(condition, own, context, size), *_segmented(condition, own, context, size)]
    if own.named is not None:
        figures.append(
            Figure(
                f"probe: {condition.says}, both shapes",
                *interval(own.named),
                size.scenes,
                chance=CHANCE,
                sizes={"scenes": size.scenes, **_runs(size)},
                group="probe",
            )
        )
    if condition != base(condition):
        figures += gains(condition, context, size)
    return figures


def tasks(own: Outcome, pairs: Sequence[Pair]) -> Mapping[str, tuple[NDArray[Any], Statistic]]:
    """One number for each task: its name → (runs, n, …) values, and the statistic of their mean."""
    found: dict[str, tuple[NDArray[Any], Statistic]] = {
        f"PCK@0.1 of the {whole}": (_shares(own.found, pairs, 0.1, whole == "box"), mean) for whole in _WHOLES
    }
    if own.confusions:
        count = sorted(own.confusions)[len(own.confusions) // 2]
        found[f"mIoU, {count} labelled images"] = own.confusions[count], mean_iou
    if own.named is not None:
        found["both shapes named"] = own.named, mean
    return found


def gains(condition: Condition, context: Context, size: Size) -> list[Figure]:
    """How much more each task gets than with plain features of the same pictures, in the same runs."""
    pairs = paired(context, size)
    own, plain = (tasks(outcome(context, each, size), pairs) for each in (condition, base(condition)))
    figures = []
    for name, (values, statistic) in own.items():
        both = np.stack((values, plain[name][0]), 2)
        figures.append(
            Figure(
                f"{condition.says}: {name}",
                *interval(both, _difference(statistic)),
                values.shape[1],
                unit="more",
                sizes=_runs(size),
                group="gain",
            )
        )
    return figures


def _keypoints(condition: Condition, own: Outcome, context: Context, size: Size) -> list[Figure]:
    every = paired(context, size)
    figures = []
    for (whole, percent), shape in itertools.product(itertools.product(_WHOLES, ALPHAS), (None, *SHAPES)):
        places = [place for place, pair in enumerate(every) if shape in (None, pair.of.shape)]
        # By shape, one number: PCK@0.1 of the box.
        if not places or (shape is not None and (whole, percent) != ("box", 10)):
            continue
        pairs, box = [every[place] for place in places], whole == "box"
        figures.append(
            Figure(
                f"{whole}: {condition.says}, {percent} %" if shape is None else f"{condition.says}; {shape}",
                *interval(_shares(own.found[:, places], pairs, percent / 100, box)),
                len(pairs),
                chance=_chance(context, f"{whole}, {percent}, {shape}, {size}", pairs, percent / 100, box),
                sizes={"percent": percent, **_runs(size)},
                group=f"keypoints-{whole}" if shape is None else "keypoints-shapes",
            )
        )
    return figures


def _chance(context: Context, name: str, pairs: Sequence[Pair], alpha: float, box: bool) -> float:
    return context.shared(f"chance, {name}", lambda: keypoints.chance(pairs, alpha, box))


def _segmented(condition: Condition, own: Outcome, context: Context, size: Size) -> list[Figure]:
    figures = []
    for count, counts in own.confusions.items():
        # All pixels given the class that is most of them.
        one = np.zeros_like(counts[0].sum(0))
        one[:, 0] = counts[0].sum((0, 2))
        figures.append(
            Figure(
                f"{condition.says}, {count} labelled images",
                *interval(counts, mean_iou),
                size.scenes,
                chance=float(mean_iou(one)),
                sizes={"labelled images": count, **_runs(size)},
                group="segmentation",
            )
        )
    return figures


def _shares(found: NDArray[np.float64], pairs: Sequence[Pair], alpha: float, box: bool) -> NDArray[np.float64]:
    """(runs, P) shares of each pair's keypoints: all are visible, so that PCK by image and by point are the same."""
    return np.stack([keypoints.correct(each, pairs, alpha, box).mean(1) for each in found])


def _difference(statistic: Statistic) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    return lambda means: statistic(means[:, 0]) - statistic(means[:, 1])


def _runs(size: Size) -> dict[str, int]:
    return {"runs": size.runs}
