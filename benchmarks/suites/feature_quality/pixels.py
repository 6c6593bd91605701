"""Pixels classified from few labelled images, by ensembles of small perceptrons."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.suites.feature_quality.conditions import Features
from benchmarks.suites.feature_quality.data import CLASSES, STRIDE
from benchmarks.suites.feature_quality.keypoints import upsampling
from dsd_fast.metrics import confusion_matrix

__all__ = ["MEMBERS", "Ensemble", "classify", "confusions", "enlarged"]

MEMBERS = 5
_HIDDEN = (32, 32)
_RATE = 5e-3
_BATCH = 128
_AT_ONCE = 25


def enlarged(maps: Tensor) -> Tensor:
    """(B, 22, 22, C): maps (B, C, 16, 16) at the pixels that have labels, bilinear."""
    enlarge = upsampling()[::STRIDE]
    return torch.einsum("ya,xb,ncab->nyxc", enlarge, enlarge, maps)


class Ensemble(nn.Module):
    """Perceptrons of two hidden layers, computed together (Baranchuk et al., ICLR 2022, which has 10 of 128 and 32).

    Args:
        channels: C of the features.
        classes: K.
        seed: of the first weights; each member has its own.
    """

    def __init__(self, channels: int, classes: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        widths = (channels, *_HIDDEN, classes)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inner, outer in itertools.pairwise(widths):
            self.weights.append(torch.randn(MEMBERS, inner, outer, generator=draw) * (2 / inner) ** 0.5)
            self.biases.append(torch.zeros(MEMBERS, 1, outer))

    def forward(self, x: Tensor) -> Tensor:
        """(members, B, K) logits of (members or 1, B, C) features."""
        return self.rest(x @ self.weights[0])

    def rest(self, x: Tensor) -> Tensor:
        """What follows the first matrix product; (members, B, K) of its (members, B, 32)."""
        x = x + self.biases[0]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            x = x.relu() @ weight + bias
        return x


def classify(maps: Features, labels: NDArray[np.int64], steps: int, seed: int) -> Callable[[Features, int], Tensor]:
    """Trains an ensemble on images with labelled pixels.

    Each member sees its own pixels, drawn alike from all images and classes as they come, with Adam and a rate that
    falls to 0 along a cosine.

    Args:
        maps: of the images.
        labels: (N, 22, 22) classes of their pixels.
        steps: how many.
        seed: of first weights and batches.

    Returns:
        (maps, N) → (N, 22, 22) classes, by the mean of the members' probabilities.
    """
    x = enlarged(maps.grid(slice(0, len(labels)))).flatten(0, 2)
    y = torch.from_numpy(labels).flatten()
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / spread
    ensemble = Ensemble(x.shape[1], len(CLASSES), seed)
    optimizer = torch.optim.Adam(ensemble.parameters(), _RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(x), (MEMBERS, _BATCH), generator=draw)
        loss = F.cross_entropy(ensemble(x[batch]).flatten(0, 1), y[batch].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()

    @torch.inference_mode()
    def predict(some: Features, count: int) -> Tensor:
        # The first product is taken on the small maps: enlarging is linear, and its weights sum to 1.
        first = torch.cat(list(ensemble.weights[0]), 1)
        found = []
        for start in range(0, count, _AT_ONCE):
            rows = (some.grid(slice(start, min(start + _AT_ONCE, count))).movedim(1, 3) - mean) / spread
            hidden = enlarged((rows @ first).movedim(3, 1))
            hidden = hidden.view(*hidden.shape[:3], MEMBERS, -1).movedim(3, 0)
            shares = ensemble.rest(hidden.flatten(1, 3)).softmax(-1).mean(0)
            found.append(shares.argmax(-1).view(-1, *labels.shape[1:]))
        return torch.cat(found)

    return predict


def confusions(
    examples: Features, scenes: Features, marked: NDArray[np.int64], truth: NDArray[np.int64], steps: int, seed: int
) -> NDArray[np.int64]:
    """(N, K, K) confusion counts of each evaluation scene, from the classifier of some labelled examples.

    Args:
        examples, scenes: their features.
        marked: classes of the examples' pixels.
        truth: classes of the scenes' pixels.
        steps, seed: as `classify` takes them.
    """
    predicted = classify(examples, marked, steps, seed)(scenes, len(truth)).numpy()
    return np.stack([confusion_matrix(*each, len(CLASSES)) for each in zip(truth, predicted, strict=True)])
