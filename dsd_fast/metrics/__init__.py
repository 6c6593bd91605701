"""Figures of merit and how sure they are.

Names that need numpy load on first use: the command line imports this room when it starts.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from dsd_fast.metrics.intervals import bootstrap, wilson

__all__ = [
    "PCK",
    "Winoground",
    "bootstrap",
    "box_extents",
    "class_accuracy",
    "class_iou",
    "confusion_matrix",
    "correct_keypoints",
    "mean_accuracy",
    "mean_iou",
    "mean_reciprocal_rank",
    "median_rank",
    "pck",
    "pixel_accuracy",
    "ranks",
    "recall_at",
    "wilson",
    "winoground",
]

if TYPE_CHECKING:
    from dsd_fast.metrics.correspondence import PCK, box_extents, correct_keypoints, pck
    from dsd_fast.metrics.retrieval import Winoground, mean_reciprocal_rank, median_rank, ranks, recall_at, winoground
    from dsd_fast.metrics.segmentation import (
        class_accuracy,
        class_iou,
        confusion_matrix,
        mean_accuracy,
        mean_iou,
        pixel_accuracy,
    )
else:
    # Hidden from type checkers, for which a module with __getattr__ has every name.
    def __getattr__(name: str) -> object:
        if name in __all__:
            for module in ("retrieval", "correspondence", "segmentation"):
                found = import_module(f"dsd_fast.metrics.{module}")
                if name in found.__all__:
                    return getattr(found, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
