"""How well pixels are classified: confusion counts, IoU and accuracy, as for Pascal VOC (Everingham et al. 2010).

A mean over images' own IoUs is another, larger or smaller, number: here all pixels of all images are counted first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["class_accuracy", "class_iou", "confusion_matrix", "mean_accuracy", "mean_iou", "pixel_accuracy"]


def confusion_matrix(
    truth: ArrayLike, predicted: ArrayLike, classes: int, *, ignore: int | None = None
) -> NDArray[np.int64]:
    """How many pixels of each class were given each class.

    Args:
        truth: class indices from 0 to `classes` - 1, or `ignore`, of any shape.
        predicted: class indices of the same shape.
        classes: how many there are.
        ignore: pixels with this truth are not counted.

    Returns:
        (classes, classes) int64: the true class in rows, the predicted one in columns. Matrices of parts of a set add
        up to that of the whole.

    Raises:
        ValueError: shapes that differ, numbers that are no integers, or a class out of range.
    """
    if classes < 1:
        raise ValueError(f"classes: got {classes}, expected at least 1")
    true, given = np.asarray(truth), np.asarray(predicted)
    if given.shape != true.shape:
        raise ValueError(f"predicted: got shape {given.shape}, expected truth's {true.shape}")
    counted = np.ones(true.shape, bool) if ignore is None else true != ignore
    found = []
    for name, values in (("truth", true), ("predicted", given)):
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name}: got {values.dtype}, expected integers")
        # int64: the product below would overflow in uint8.
        some = values[counted].astype(np.int64)
        if some.size and not 0 <= some.min() <= some.max() < classes:
            raise ValueError(f"{name}: got classes {some.min()} to {some.max()}, expected 0 to {classes - 1}")
        found.append(some)
    return np.bincount(found[0] * classes + found[1], minlength=classes**2).reshape(classes, classes)


def class_iou(confusion: ArrayLike) -> NDArray[np.float64]:
    """(…, K) intersection over union of each class, of (…, K, K) confusion counts.

    NaN for a class that is absent: neither true nor predicted anywhere. One that is predicted but never true has 0.

    Raises:
        ValueError: no square matrices, or a negative count.
    """
    counts = _counts(confusion)
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    return _share(right, counts.sum(-1) + counts.sum(-2) - right)


def mean_iou(confusion: ArrayLike) -> NDArray[np.float64]:
    """mIoU: the mean of :func:`class_iou` over the classes that are not absent, (…); NaN without any pixel."""
    return _mean(class_iou(confusion))


def class_accuracy(confusion: ArrayLike) -> NDArray[np.float64]:
    """(…, K) share of each class's pixels that were given it (its recall); NaN for a class that is never true.

    Raises:
        ValueError: no square matrices, or a negative count.
    """
    counts = _counts(confusion)
    return _share(np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1))


def mean_accuracy(confusion: ArrayLike) -> NDArray[np.float64]:
    """mAcc: the mean of :func:`class_accuracy` over the classes that are true somewhere, (…)."""
    return _mean(class_accuracy(confusion))


def pixel_accuracy(confusion: ArrayLike) -> NDArray[np.float64]:
    """aAcc: the share of all pixels that were given their class, (…); NaN without any pixel.

    Raises:
        ValueError: no square matrices, or a negative count.
    """
    counts = _counts(confusion)
    return _share(np.diagonal(counts, axis1=-2, axis2=-1).sum(-1), counts.sum((-2, -1)))


def _counts(confusion: ArrayLike) -> NDArray[np.float64]:
    # Not integers alone: a bootstrap weighs counts.
    counts = np.asarray(confusion, np.float64)
    if counts.ndim < 2 or counts.shape[-1] != counts.shape[-2] or not counts.shape[-1]:
        raise ValueError(f"confusion: got shape {counts.shape}, expected (…, K, K)")
    if not (counts >= 0).all():
        raise ValueError(f"confusion: got {counts.min()}, expected counts of 0 or more")
    return counts


def _share(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0))


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    there = ~np.isnan(values)
    return _share(np.where(there, values, 0).sum(-1), there.sum(-1))
