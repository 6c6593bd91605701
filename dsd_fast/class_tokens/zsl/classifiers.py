"""Classifiers on frozen features, of real images of seen and generated ones of unseen classes."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

CLASSIFIERS = ("softmax", "gaussian")

# Of softmax regression: scikit-learn's own, and more steps than it, for features that are far from separable.
_STRENGTH = 1.0
_STEPS = 2000

Floats = NDArray[np.float64]


def check_installed() -> None:
    """Refuse to begin what could not be ended.

    Raises:
        ImportError: scikit-learn is not installed; says which extra brings it.
    """
    if find_spec("sklearn") is None:
        raise ImportError("zero-shot learning needs scikit-learn: pip install 'dsd-fast[zsl]'")


def probabilities(
    kind: str, features: NDArray[np.floating], labels: NDArray[np.intp], classes: int, test: NDArray[np.floating]
) -> Floats:
    """Fit a classifier, each class counting the same however many images it has, and give (n, C) probabilities.

    Features are standardised by the mean and deviation of those that are learned from.

    Args:
        kind: "softmax": softmax regression with an L2 penalty. "gaussian": a Gaussian for each class, as in Qi et al.
            2024, "A Simple and Efficient Baseline for Zero-Shot Generative Classification"; here with one covariance
            for all of them, of all distances from their means, shrunk by Ledoit and Wolf 2004, since there are fewer
            images of a class than features. Of log-likelihoods the mean over features counts, which changes no first
            class: of their sum nearly all probabilities would be 0 or 1, and no penalty could be told from another.
        features: (N, D), to learn from.
        labels: (N,) classes from 0 to C - 1, each there.
        classes: C, at least 2.
        test: (n, D).

    Raises:
        ValueError: a class without an image.
        ImportError: scikit-learn is not installed.
    """
    lacking = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if len(lacking):
        raise ValueError(f"features: there are none of class {lacking[0]}")
    check_installed()
    from sklearn.covariance import ledoit_wolf
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    known, asked = np.asarray(features, np.float64), np.asarray(test, np.float64)
    mean, deviation = known.mean(0), known.std(0)
    # A feature that never changes says nothing.
    deviation[deviation <= 1e-12 * np.abs(mean)] = np.inf
    known, asked = (known - mean) / deviation, (asked - mean) / deviation
    if kind == "softmax":
        model = LogisticRegression(C=_STRENGTH, class_weight="balanced", max_iter=_STEPS)
        with warnings.catch_warnings():
            # Probabilities are by then the same to far more digits than figures have.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return np.asarray(model.fit(known, labels).predict_proba(asked))
    if kind != "gaussian":
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(CLASSIFIERS)}")
    means = np.stack([known[labels == c].mean(0) for c in range(classes)])
    covariance, _ = ledoit_wolf(known - means[labels], assume_centered=True)
    # Of images that are all their classes' means nothing is known of the covariance.
    covariance = covariance if np.trace(covariance) > 0 else np.eye(len(covariance))
    weights = np.linalg.solve(covariance, means.T)
    scores = (asked @ weights - (means * weights.T).sum(1) / 2) / len(covariance)
    scores = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(scores / scores.sum(1, keepdims=True))
