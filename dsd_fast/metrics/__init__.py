"""Figures of merit and how sure they are."""

from dsd_fast.metrics.correspondence import PCK, box_extents, correct_keypoints, pck
from dsd_fast.metrics.images import clip_score, frechet_distance, guide_accuracy, kernel_distance
from dsd_fast.metrics.intervals import bootstrap, wilson
from dsd_fast.metrics.retrieval import Winoground, mean_reciprocal_rank, median_rank, ranks, recall_at, winoground
from dsd_fast.metrics.segmentation import (
    class_accuracy,
    class_iou,
    confusion_matrix,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
)
from dsd_fast.metrics.zero_shot import ZeroShot, best_penalty, class_means, stacked, zero_shot

__all__ = [
    "PCK",
    "Winoground",
    "ZeroShot",
    "best_penalty",
    "bootstrap",
    "box_extents",
    "class_accuracy",
    "class_iou",
    "class_means",
    "clip_score",
    "confusion_matrix",
    "correct_keypoints",
    "frechet_distance",
    "guide_accuracy",
    "kernel_distance",
    "mean_accuracy",
    "mean_iou",
    "mean_reciprocal_rank",
    "median_rank",
    "pck",
    "pixel_accuracy",
    "ranks",
    "recall_at",
    "stacked",
    "wilson",
    "winoground",
    "zero_shot",
]
