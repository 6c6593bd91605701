"""Features on their way to host memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dsd_fast.features.extraction import Extracted
from dsd_fast.kernels.common.transfer import Download, one_behind


def on_host(chunks: Iterator[Extracted]) -> Iterator[tuple[Extracted, list[bool]]]:
    """Chunks of one technique with their features in host memory, and whether all values of each image are finite.

    From a GPU a chunk is copied beside the computation of the next one.
    """
    begun = ((chunk, Download({"": _finite(chunk), **chunk.features[0]})) for chunk in chunks)
    # Not a loop, whose variables would hold a chunk on the GPU while the one after the next is computed.
    return map(_arrived, one_behind(begun))


def _arrived(begun: tuple[Extracted, Download]) -> tuple[Extracted, list[bool]]:
    features = begun[1].done()
    finite: list[bool] = features.pop("").tolist()
    return replace(begun[0], features=[features]), finite


def _finite(chunk: Extracted) -> Tensor:
    """(n,) whether all values of each image are finite numbers."""
    found = []
    for value in chunk.features[0].values():
        if not chunk.numbers:
            return torch.ones(0, dtype=torch.bool, device="cpu")
        # NaN wins in both, and nothing of the features' size is made.
        low, high = torch.aminmax(value.flatten(1), dim=1)
        found.append(low.isfinite() & high.isfinite())
    return torch.stack(found).all(0)
