"""What a linear classifier reads from whole maps: the shapes that a scene shows."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.suites.feature_quality.conditions import Features

__all__ = ["CHANCE", "pooled", "probe"]

CHANCE = 1 / 10
"""Of naming both of a scene's two shapes, of five."""
_AT_ONCE = 100


def pooled(maps: Features, count: int) -> Tensor:
    """(N, 2 C): mean and maximum over positions. An object is small: the mean alone is mostly about the background."""
    found = []
    for start in range(0, count, _AT_ONCE):
        some = maps.grid(slice(start, min(start + _AT_ONCE, count)))
        found.append(torch.cat((some.mean((2, 3)), some.amax((2, 3))), 1))
    return torch.cat(found)


def probe(
    examples: Features, scenes: Features, marked: NDArray[np.bool_], truth: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """(N,): whether both shapes of an evaluation scene are named.

    A logistic regression for each shape tells how likely it is to be there; the two likeliest are named.

    Args:
        examples, scenes: their features.
        marked, truth: (N, 5), the shapes that examples and evaluation scenes show.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.linear_model import LogisticRegression

    x, y = (pooled(*each).double().numpy() for each in ((examples, len(marked)), (scenes, len(truth))))
    mean, spread = x.mean(0), x.std(0).clip(1e-6)
    x, y = (x - mean) / spread, (y - mean) / spread
    # Standardised channels, and far fewer scenes than channels: a tenth of the usual weight of the data.
    fits = [LogisticRegression(C=0.1, max_iter=300).fit(x, each) for each in marked.T]
    scores = np.stack([fit.decision_function(y) for fit in fits], 1)
    likeliest = np.argsort(-scores, 1)[:, :2]
    return np.asarray(np.take_along_axis(truth, likeliest, 1).all(1))
