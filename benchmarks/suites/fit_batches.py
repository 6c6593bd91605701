"""What the conventions of the official evaluation make of the same scores: attention terms averaged over a batch."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.suites.fit_quality import CONFIG, example
from dsd_fast.bench.case import Context, Figure
from dsd_fast.bench.suites.shared import mini
from dsd_fast.matching import Group, Matcher
from dsd_fast.matching.evaluation import Evaluation
from dsd_fast.matching.group_results import judge
from dsd_fast.matching.group_scores import score_groups
from dsd_fast.models.mini.scenes import EVAL_SEED, Scene, scene

BATCHES = (1, 16)
"""Groups whose attention terms the official evaluation averages."""
BATCH_GROUPS = 1024


def batch_means(context: Context, *, n: int = BATCH_GROUPS) -> list[Figure]:
    """Zero-shot accuracy of the official score for each question by itself, and under the official conventions."""
    matcher = Matcher(mini(context), replace(CONFIG, official=True))
    figures = []
    for question, groups in (("two images", _two_images(n)), ("two captions", _two_captions(n))):
        scores = list(score_groups(matcher, groups))
        for batch, how in ((None, "each by itself"), *((size, f"batches of {size}") for size in BATCHES)):
            ties = "wrong" if batch is None else "right"
            results = judge(groups, scores, batch_mean=batch, ties=ties, parts=("attention",))
            whole = Evaluation.of(results)
            for part, found in (("attention and noise", whole), ("attention alone", whole.parts["attention"])):
                figure = found.figures["accuracy"]
                low, high = figure.bootstrap
                figures.append(
                    Figure(
                        f"{question}, {part}, {how}",
                        figure.value,
                        min(low, figure.value),
                        max(high, figure.value),
                        figure.n,
                        chance=figure.chance,
                        sizes={} if batch is None else {"batch": batch},
                    )
                )
    return figures


def _two_images(n: int) -> list[Group]:
    """A caption with its picture and another, as ComVG asks."""
    scenes = [_evaluation_scene(i) for i in range(2 * n)]
    pairs = zip(scenes[:n], scenes[n:], strict=True)
    return [Group((right.image, other.image), (right.caption,)) for right, other in pairs]


def _two_captions(n: int) -> list[Group]:
    """A picture with its caption and the negative of another colour."""
    return [example(_evaluation_scene(i), ("colour",)) for i in range(n)]


def _evaluation_scene(place: int) -> Scene:
    return scene(EVAL_SEED + place, objects=2)
