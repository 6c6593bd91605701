"""Whether keypoints are found again in another image: PCK, the percentage of correct keypoints.

A predicted keypoint is correct when it lies within α · max(h, w) of the true one (Yang and Ramanan 2013). SPair-71k
(Min et al. 2019) takes h and w of the object's bounding box in the target image ("bbox") or of that whole image
("img").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["PCK", "box_extents", "correct_keypoints", "pck"]


class PCK(NamedTuple):
    """The share of correct keypoints, 0 to 1, averaged in the two ways that are in use.

    Attributes:
        image: the share within each image, then the mean over the images that have a visible keypoint.
        point: over all visible keypoints of all images.
    """

    image: float
    point: float


def box_extents(boxes: ArrayLike) -> NDArray[np.float64]:
    """(…, 2) heights and widths in pixels of (…, 4) boxes x0, y0, x1, y1, whose x1 and y1 are exclusive.

    Raises:
        ValueError: another shape, or a box without a positive height and width.
    """
    array = np.asarray(boxes, np.float64)
    if array.ndim == 0 or array.shape[-1] != 4:
        raise ValueError(f"boxes: got shape {array.shape}, expected (…, 4), x0, y0, x1, y1")
    extents = np.stack((array[..., 3] - array[..., 1], array[..., 2] - array[..., 0]), -1)
    if not (extents > 0).all():
        raise ValueError(f"boxes: got heights and widths from {extents.min()}, expected x1 > x0 and y1 > y0")
    return extents


def correct_keypoints(
    predicted: ArrayLike, truth: ArrayLike, extents: ArrayLike, alpha: float = 0.1
) -> NDArray[np.bool_]:
    """Which keypoints lie within α · max(h, w) of the true ones.

    Args:
        predicted: (…, K, 2) points in pixels; one with a NaN is wrong.
        truth: (…, K, 2) points in pixels.
        extents: (…, 2) heights and widths in pixels that the distance is measured by, or one (2,) for all.
        alpha: above 0.

    Returns:
        (…, K) bool. A distance of exactly α · max(h, w) is correct.

    Raises:
        ValueError: shapes that do not fit, an extent that is not positive, or an alpha that is not.
    """
    points, true, sizes = (np.asarray(each, np.float64) for each in (predicted, truth, extents))
    if true.ndim < 2 or true.shape[-1] != 2:
        raise ValueError(f"truth: got shape {true.shape}, expected (…, K, 2)")
    if points.shape != true.shape:
        raise ValueError(f"predicted: got shape {points.shape}, expected truth's {true.shape}")
    if sizes.shape not in ((2,), (*true.shape[:-2], 2)):
        raise ValueError(f"extents: got shape {sizes.shape}, expected (2,) or {(*true.shape[:-2], 2)}")
    if not (sizes > 0).all():
        raise ValueError(f"extents: got {sizes.min()}, expected positive heights and widths")
    if not alpha > 0:
        raise ValueError(f"alpha: got {alpha}, expected a number above 0")
    distance = np.hypot(*np.moveaxis(points - true, -1, 0))
    return np.asarray(distance <= alpha * sizes.max(-1)[..., None])


def pck(correct: ArrayLike, visible: ArrayLike | None = None) -> PCK:
    """PCK from which keypoints are correct.

    Args:
        correct: (N, K) bool, K keypoints in each of N images (of pairs: the target's).
        visible: (N, K) bool, the keypoints that are there in both images of a pair; None: all. The others count
            neither as right nor as wrong.

    Raises:
        ValueError: shapes that do not fit, or no visible keypoint.
    """
    right: NDArray[Any] = np.asarray(correct, bool)
    if right.ndim != 2:
        raise ValueError(f"correct: got shape {right.shape}, expected (N, K)")
    shown = np.ones_like(right) if visible is None else np.asarray(visible, bool)
    if shown.shape != right.shape:
        raise ValueError(f"visible: got shape {shown.shape}, expected correct's {right.shape}")
    if not shown.any():
        raise ValueError("visible: got no visible keypoint, expected at least one")
    counts, found = shown.sum(1), (right & shown).sum(1)
    some = counts > 0
    return PCK(float((found[some] / counts[some]).mean()), float(found.sum() / counts.sum()))
