"""The amalgamated condition: maps of several conditions, mixed as labelled pixels teach it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from benchmarks.suites.feature_quality.conditions import Features
from benchmarks.suites.feature_quality.data import CLASSES
from benchmarks.suites.feature_quality.pixels import enlarged
from dsd_fast.features import Amalgamation
from dsd_fast.features.amalgamation import add_loss_terms

__all__ = ["learn", "mix"]

_ASSIGNERS = 2
_STEPS = 60
_RATE = 3e-3
_BATCH = 4
_AT_ONCE = 25
_SPARSITY = _DIVERSITY = 0.01


@torch.inference_mode()
def mix(amalgamation: Amalgamation, parts: Sequence[Features]) -> Features:
    """Features of several conditions, mixed by a trained amalgamation: one map of assigners · C channels."""
    found = []
    for start in range(0, len(parts[0]), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        found.append(amalgamation([part.grid(rows) for part in parts]).half())
    return Features([torch.cat(found)])


def learn(parts: Sequence[Features], labels: NDArray[np.int64], seed: int) -> Amalgamation:
    """An amalgamation trained with a linear pixel classifier on labelled images (Meng et al. 2024, appendix A.4).

    Args:
        parts: features of each condition, whose first scenes are the labelled ones.
        labels: (N, 22, 22) classes of their pixels.
        seed: of first weights, dropout and batches.
    """
    maps = [part.grid(slice(0, len(labels))) for part in parts]
    truth = torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        amalgamation = Amalgamation([each.shape[1] for each in maps], _ASSIGNERS, kind="pixel")
        head = nn.Linear(_ASSIGNERS * amalgamation.width, len(CLASSES))
        optimizer = torch.optim.Adam([*amalgamation.parameters(), *head.parameters()], _RATE)
        for _ in range(_STEPS):
            batch = torch.randperm(len(truth))[:_BATCH]
            mixed = amalgamation.amalgamate([each[batch] for each in maps])
            loss = F.cross_entropy(head(enlarged(mixed.features)).flatten(0, 2), truth[batch].flatten())
            loss = add_loss_terms(loss, mixed, sparsity=_SPARSITY, diversity=_DIVERSITY)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return amalgamation.eval()
