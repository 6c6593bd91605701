"""What the three tasks give with the features of a condition, in every run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.suites.feature_quality import data, keypoints, mixing, pixels, probes
from benchmarks.suites.feature_quality.conditions import Condition, features, named
from benchmarks.suites.feature_quality.data import Pair, Size
from dsd_fast.bench.case import Context
from dsd_fast.models.mini.scenes import Scene

__all__ = ["Outcome", "outcome", "paired", "scenes"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Of R runs on n evaluation scenes and P pairs of them; what a condition is told has no confusions and no names.

    Attributes:
        found: (R, P, 5, 2), where the keypoints were found.
        confusions: number of labelled images → (R, n, K, K) counts.
        named: (R, n), whether both shapes were named.
    """

    found: NDArray[np.float64]
    confusions: dict[int, NDArray[np.int64]]
    named: NDArray[np.bool_] | None


def paired(context: Context, size: Size) -> list[Pair]:
    """The pairs of evaluation scenes, the same in every run."""
    return context.shared(f"pairs, {size}", lambda: data.pairs(scenes(context, size, None)))


def outcome(context: Context, condition: Condition, size: Size) -> Outcome:
    """Measured once for all cases that ask for it."""

    def make() -> Outcome:
        runs = [_run(context, condition, run, size) for run in range(size.runs)]
        return Outcome(
            np.stack([found for found, _, _ in runs]),
            {count: np.stack([counts[count] for _, counts, _ in runs]) for count in runs[0][1]},
            None if condition.told else np.stack([right for _, _, right in runs]),
        )

    return context.shared(f"outcome, {condition.name}, {size}", make)


def scenes(context: Context, size: Size, run: int | None) -> list[Scene]:
    """For evaluation, or the examples of a run; drawn once for all cases."""
    return context.shared(f"scenes, {run}, {size}", lambda: data.scenes(size, run))


def _run(
    context: Context, condition: Condition, run: int, size: Size
) -> tuple[NDArray[np.float64], dict[int, NDArray[np.int64]], NDArray[np.bool_]]:
    taught, asked = scenes(context, size, run), scenes(context, size, None)
    marked, truth = data.labels(taught), data.labels(asked)
    counts = {}
    if condition.mixed:
        parts = [features(context, named(part), run, size) for part in condition.parts]
        learnt, told = ([part[which] for part in parts] for which in (0, 1))
    else:
        teach, ask = features(context, condition, run, size)
    for count in () if condition.told else size.labelled:
        if condition.mixed:
            amalgamation = mixing.learn(learnt, marked[:count], run)
            teach, ask = mixing.mix(amalgamation, learnt), mixing.mix(amalgamation, told)
        counts[count] = pixels.confusions(teach, ask, marked[:count], truth, size.steps, run)
    # Of an amalgamation, the one that most labels taught.
    points = keypoints.find(ask, paired(context, size))
    if condition.told:
        return points, counts, np.zeros(0, bool)
    return points, counts, probes.probe(teach, ask, data.present(taught), data.present(asked))
