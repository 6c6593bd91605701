"""How far each condition's features have shifted from the picture, and whether that tells what they are good for."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from benchmarks.suites.feature_quality import conditions, data
from benchmarks.suites.feature_quality.conditions import CONDITIONS, Condition
from benchmarks.suites.feature_quality.data import Size
from benchmarks.suites.feature_quality.figures import SIZE, tasks
from benchmarks.suites.feature_quality.outcomes import outcome, paired, scenes
from benchmarks.suites.intervals import interval
from dsd_fast.bench.case import Context, Figure, UnavailableError

__all__ = ["correlations", "measurable", "scores", "shifted"]


def measurable(condition: Condition) -> bool:
    """Whether the features have a shift: they are layers of one condition, and not the reference itself."""
    return not condition.parts and not condition.attention and condition.timestep > 0


def scores(context: Context, condition: Condition, size: Size) -> NDArray[np.float64]:
    """(n,): the score of each evaluation scene (`dsd_fast.features.shift`, equation 2), its mean over the layers.

    The reference is the same condition at t = 0; the anchor is plain, at t = 800. The noise is that of the first run.
    """
    from dsd_fast.features.shift import measure_shift

    def make() -> NDArray[np.float64]:
        drawn = scenes(context, size, None)
        found = measure_shift(
            conditions.extractor(context, condition, raw=True),
            conditions.pictures(condition, drawn),
            prompts=[conditions.caption(each, condition.prompt) for each in drawn],
            seeds=data.seeds(len(drawn), 0, examples=False),
        )
        return np.asarray(found.scores[0, :, 0].mean(0))

    return context.shared(f"shift, {condition.name}, {size}", make)


def shifted(condition: Condition, context: Context, *, size: Size = SIZE) -> list[Figure]:
    """The mean score of a condition."""
    found = scores(context, condition, size)
    name, sizes = f"shift: {condition.says}, score", {"scenes": len(found)}
    return [Figure(name, *interval(found[None]), len(found), unit="score", sizes=sizes, group="shift")]


def correlations(context: Context, *, size: Size = SIZE) -> list[Figure]:
    """Spearman's rank correlation of the score with what each task gives, over the conditions of plain scenes.

    The interval is that of Fieller, Hartley and Pearson (1957) by Fisher's transformation; n counts conditions.
    """
    from scipy.stats import spearmanr

    pairs = paired(context, size)
    kept: list[Condition] = []
    told: list[float] = []
    found: dict[str, list[float]] = {}
    for condition in (each for each in CONDITIONS if measurable(each) and not each.night and not each.told):
        try:
            values = tasks(outcome(context, condition, size), pairs)
        except UnavailableError:
            continue
        kept.append(condition)
        told.append(float(scores(context, condition, size).mean()))
        for name, (each, statistic) in values.items():
            found.setdefault(name, []).append(float(statistic(each.mean((0, 1))[None])[0]))
    early = [place for place, condition in enumerate(kept) if condition.timestep == 50]
    figures = []
    for which, places in (("all conditions", range(len(kept))), ("conditions at t = 50", early)):
        for name, given in found.items():
            rho = float(spearmanr([told[place] for place in places], [given[place] for place in places]).statistic)
            half = 1.96 * math.sqrt(1.06 / (len(places) - 3))
            middle = math.atanh(min(max(rho, -1 + 1e-9), 1 - 1e-9))
            low, high = math.tanh(middle - half), math.tanh(middle + half)
            figures.append(
                Figure(
                    f"{which}: score and {name}",
                    rho,
                    min(low, rho),
                    max(high, rho),
                    len(places),
                    unit="rank correlation",
                    group="shift-tells",
                )
            )
    return figures
