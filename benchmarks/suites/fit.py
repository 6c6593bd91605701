"""What few-shot adaptation of matching brings, by method, and what the official evaluation makes of scores."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.suites import fit_ablation as ablation
from benchmarks.suites import fit_batches as batches
from benchmarks.suites import fit_dtype as dtypes
from benchmarks.suites import fit_heads as heads
from benchmarks.suites import fit_quality as quality
from dsd_fast.bench.case import Group, Quality

__all__ = ["CASES", "GROUPS"]

TRIALS = (
    ("heads", "both"),
    ("lora", "both"),
    ("lora+heads", "both"),
    ("prompt", "both"),
    ("heads", "attention"),
    ("lora", "attention"),
    ("lora", "noise"),
)
"""Methods, and the part of the score that each is trained and evaluated with."""


def _groups() -> Iterator[Group]:
    for each in quality.SETS:
        kinds = " and ".join(filter(None, (", ".join(each.kinds[:-1]), each.kinds[-1])))
        rivals = f"the caption against its {kinds} negative{'s' if len(each.kinds) > 1 else ''}"
        title = f"Right answers on {each.name}, {rivals}"
        yield Group(quality.slug(each), title, plot="growth", x="examples", wide=True)
        yield Group(f"{quality.slug(each)}-parts", f"{title}, by one part of the score", x="examples", wide=True)


def _adapted() -> Iterator[Quality]:
    for method, objective in TRIALS:
        for count in quality.EXAMPLES:
            measure = partial(quality.adapted, method, objective, count)
            yield Quality(f"{method}/{objective}/{count}", quality.slug(quality.SETS[0]), measure, long=True)


def _ablation() -> Iterator[Quality]:
    for change in ablation.CHANGES:
        measure = partial(ablation.ablation, change)
        yield Quality(f"{ablation.GROUP}/{change.name}", ablation.GROUP, measure, long=True)


GROUPS = [
    *_groups(),
    Group(
        ablation.GROUP,
        f"Right answers after one fit to {ablation.COUNT} examples, each line with one thing changed",
        x="examples",
        wide=True,
    ),
    Group(
        heads.GROUP,
        "How often a head's attention term by itself puts the caption above a negative of new scenes, zero-shot",
    ),
    Group(
        dtypes.GROUP,
        f"bfloat16 beside float32: right answers after a fit of {dtypes.FIT.steps} steps to {dtypes.COUNT} examples",
    ),
    Group("batch-mean", "Right answers of the official score, zero-shot, by convention"),
]
CASES = [
    Quality("zero-shot", quality.slug(quality.SETS[0]), quality.zero_shot, long=True),
    *_adapted(),
    *_ablation(),
    Quality("single-heads", heads.GROUP, heads.single_heads, long=True),
    Quality("dtype/quality", dtypes.GROUP, dtypes.fits, long=True),
    Quality("batch-mean", "batch-mean", batches.batch_means, long=True),
]
"""What the suite ``fit`` has beside its speeds."""
