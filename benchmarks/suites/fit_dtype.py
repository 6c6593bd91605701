"""What a fit on a network of 16 bits gives beside one on float32's: the same examples, draws and first weights."""

from __future__ import annotations

import time
from dataclasses import replace

from benchmarks.suites import fit_quality as quality
from dsd_fast.bench.case import Context, Figure
from dsd_fast.bench.suites.shared import DTYPES, mini
from dsd_fast.matching import FitConfig, Matcher

GROUP = "dtype-quality"
METHOD = "lora"
COUNT = 64
"""Examples."""
FIT = replace(quality.FIT, steps=60)


def fits(context: Context, *, n: int = quality.N, fit: FitConfig = FIT) -> list[Figure]:
    """The share right of new scenes after a fit in each type, how often both answer alike, and seconds of a step."""
    each = quality.SETS[0]
    scenes = quality.evaluation_scenes(context, n, each.held_out)
    sizes = {"examples": COUNT, "steps": fit.steps}
    figures, answers = [], []
    for dtype in DTYPES:
        matcher = Matcher(mini(context, dtype), quality.CONFIG)
        begin = time.perf_counter()
        matcher.fit(quality.examples(COUNT, 0), METHOD, config=fit, progress=False)
        seconds = (time.perf_counter() - begin) / fit.steps
        right = each.right(quality.score(matcher._scorer, scenes)["both"], scenes.kinds)
        answers.append(right)
        chance = 1 / (1 + len(each.kinds))
        name = f"{each.name}: {quality.METHODS[METHOD]}, {dtype}"
        figures.append(
            Figure.share(name, int(right.sum()), n, chance=chance, sizes=sizes, seconds=seconds, item="step")
        )
    same = int((answers[0] == answers[1]).sum())
    figures.append(Figure.share(f"{each.name}: right or wrong in both", same, n, sizes=sizes))
    return figures
