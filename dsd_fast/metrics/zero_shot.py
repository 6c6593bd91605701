"""How well classes without training images are told apart, alone (T1) and among all others (U, S and H).

Accuracies are means over classes of each class's own accuracy, as in Xian et al. 2019, "Zero-Shot Learning: A
Comprehensive Evaluation of the Good, the Bad and the Ugly", section 4.2; calibrated stacking is of Chao et al. 2016,
"An Empirical Study and Analysis of Generalized Zero-Shot Learning for Object Recognition in the Wild", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ZeroShot", "best_penalty", "class_means", "stacked", "zero_shot"]


@dataclass(frozen=True)
class ZeroShot:
    """Accuracies from 0 to 1, each a mean over classes.

    Attributes:
        t1: of images of unseen classes, among the unseen classes alone.
        u: of images of unseen classes, among all classes.
        s: of images of seen classes, among all classes.
        h: the harmonic mean of u and s, 0 where both are.
        per_class: (C,) accuracy among all classes; NaN for a class without images.
    """

    t1: float
    u: float
    s: float
    h: float
    per_class: NDArray[np.float64]


def class_means(right: ArrayLike, labels: ArrayLike, classes: int) -> NDArray[np.float64]:
    """(C,) share of each class's images that are right; NaN for a class without images.

    Args:
        right: (n,) bool.
        labels: (n,) classes from 0 to ``classes`` - 1.

    Raises:
        ValueError: other shapes, or a class out of range.
    """
    hits, true = np.asarray(right, bool), _labels(labels, classes)
    if hits.shape != true.shape:
        raise ValueError(f"right: got shape {hits.shape}, expected labels' {true.shape}")
    with np.errstate(invalid="ignore"):
        return np.bincount(true, hits, classes) / np.bincount(true, minlength=classes)


def stacked(scores: ArrayLike, seen: ArrayLike, penalty: float) -> NDArray[np.intp]:
    """Calibrated stacking: (n,) the class of the largest score once the seen classes' are less by ``penalty``.

    A penalty of 0 is the plain argmax; of probabilities, one above 1 leaves no seen class, and one of 1 none but where
    all of the probability is a seen class's.

    Args:
        scores: (n, C).
        seen: (C,) bool.

    Raises:
        ValueError: other shapes, or no finite numbers.
    """
    given, known = _scores(scores, seen)
    return np.asarray((given - penalty * known).argmax(1))


def zero_shot(scores: ArrayLike, labels: ArrayLike, seen: ArrayLike, penalty: float = 0.0) -> ZeroShot:
    """T1, U, S and H of scores, under calibrated stacking.

    Args:
        scores: (n, C), of images of seen and unseen classes.
        labels: (n,) classes from 0 to C - 1.
        seen: (C,) bool, the classes with training images.
        penalty: of the seen classes, see :func:`stacked`; T1 does not depend on it.

    Raises:
        ValueError: other shapes, no finite numbers, or no image of seen or of unseen classes.
    """
    given, known = _scores(scores, seen)
    true = _both(given, labels, known)
    per_class = class_means(stacked(given, known, penalty) == true, true, len(known))
    alone = np.where(known, -np.inf, given).argmax(1)
    u, s = (float(np.nanmean(per_class[which])) for which in (~known, known))
    t1 = float(np.nanmean(class_means(alone == true, true, len(known))[~known]))
    return ZeroShot(t1, u, s, 2 * u * s / (u + s) if u + s else 0.0, per_class)


def best_penalty(scores: ArrayLike, labels: ArrayLike, seen: ArrayLike) -> float:
    """The penalty from 0 to 1 with the largest H, of validation classes say.

    H changes at the images' own margins alone: of the stretches of penalties between them with the largest H it is the
    middle of the longest.

    Args:
        scores: (n, C) probabilities; else as :func:`zero_shot`.

    Raises:
        ValueError: as there.
    """
    given, known = _scores(scores, seen)
    true = _both(given, labels, known)
    first = {which: np.where(known == which, given, -np.inf) for which in (True, False)}
    # Above its margin an image is given its first unseen class, below it its first seen one.
    margin = first[True].max(1) - first[False].max(1)
    right = np.where(known[true], first[True].argmax(1), first[False].argmax(1)) == true
    counts = np.bincount(true, minlength=len(known))
    weight = right / counts[true]
    order = np.argsort(margin, kind="stable")
    edges = np.concatenate(([0.0], np.clip(margin[order], 0, 1), [1.0]))
    sums = [np.cumsum((weight * (known[true] == which))[order]) for which in (False, True)]
    unseen, own = (np.concatenate(([0.0], each)) for each in sums)
    u = unseen / np.count_nonzero(counts[~known])
    s = (own[-1] - own) / np.count_nonzero(counts[known])
    with np.errstate(invalid="ignore"):
        h = np.nan_to_num(2 * u * s / (u + s))
    length = np.diff(edges)
    # Equal sums in another order differ by rounding.
    best = np.flatnonzero((length > 0) & (h >= h[length > 0].max() - 1e-12))
    chosen = best[length[best].argmax()]
    return float((edges[chosen] + edges[chosen + 1]) / 2)


def _scores(scores: ArrayLike, seen: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    given, known = np.asarray(scores, np.float64), np.asarray(seen)
    if given.ndim != 2 or not np.isfinite(given).all():
        raise ValueError(f"scores: got shape {given.shape}, expected (n, C) finite numbers")
    if known.dtype != bool or known.shape != given.shape[1:]:
        raise ValueError(f"seen: got {known.dtype} {known.shape}, expected bool {given.shape[1:]}")
    return given, known


def _both(scores: NDArray[Any], labels: ArrayLike, seen: NDArray[np.bool_]) -> NDArray[np.intp]:
    true = _labels(labels, len(seen))
    if true.shape != scores.shape[:1]:
        raise ValueError(f"labels: got shape {true.shape}, expected a class for each of {len(scores)} rows of scores")
    for name, which in (("seen", True), ("unseen", False)):
        if not (seen[true] == which).any():
            raise ValueError(f"labels: there is no image of {name} classes, expected some of both")
    return true


def _labels(labels: ArrayLike, classes: int) -> NDArray[np.intp]:
    true = np.asarray(labels)
    if true.ndim != 1 or (len(true) and not np.issubdtype(true.dtype, np.integer)):
        raise ValueError(f"labels: got {true.dtype} {true.shape}, expected (n,) integers")
    if len(true) and not 0 <= true.min() <= true.max() < classes:
        raise ValueError(f"labels: got classes {true.min()} to {true.max()}, expected 0 to {classes - 1}")
    return true.astype(np.intp)
