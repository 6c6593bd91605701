"""Do multi-timestep features, and what keeps them true to the image, help? The mini model on scenes with ground truth.

Three tasks that read features, each with every way to get them: keypoints found again on another object, pixels
classified from few labelled images, and linear probes. Prompts never tell what is asked for.

Nothing is timed here, so it may run beside other work.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.suites.feature_quality.conditions import CONDITIONS
from benchmarks.suites.feature_quality.figures import measured
from benchmarks.suites.feature_quality.shift import correlations, measurable, shifted
from dsd_fast.bench.case import Group, Quality, Suite

__all__ = ["suite"]


def _cases() -> Iterator[Quality]:
    for condition in CONDITIONS:
        yield Quality(condition.name, "probe", partial(measured, condition), long=True)
        if measurable(condition):
            yield Quality(f"shift/{condition.name}", "shift", partial(shifted, condition), long=True)
    yield Quality("shift-tells", "shift-tells", correlations, long=True)


suite = Suite(
    "feature-quality",
    groups=(
        Group(
            "keypoints-box",
            "Keypoints found again on an object of the same shape and another colour, size and place, PCK by per cent"
            " of the object's box",
            x="percent",
            wide=True,
        ),
        Group(
            "keypoints-image",
            "Keypoints found again on an object of the same shape and another colour, size and place, PCK by per cent"
            " of the picture",
            x="percent",
            wide=True,
        ),
        Group("keypoints-shapes", "Keypoints found again, PCK@0.1 of the object's box by shape", columns="; "),
        Group(
            "segmentation",
            "Pixels classified as background or one of five shapes, mIoU by number of labelled images",
            x="labelled images",
            wide=True,
        ),
        Group("probe", "Both shapes of a scene named by linear probes", x="scenes", wide=True),
        Group(
            "shift",
            "Content shift, mean over layers: 1 is none, 0 as much as that of plain features at t = 800",
            x="scenes",
            wide=True,
        ),
        Group("shift-tells", "Rank correlation of the content shift's score with what the tasks give", columns=": "),
        Group(
            "gain",
            "How much more the tasks get than with plain features of the same pictures at t = 50",
            columns=": ",
        ),
    ),
    cases=tuple(_cases()),
)
