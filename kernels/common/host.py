"""What the caller's program is under (default types and devices, inference mode, autocast), kept from the answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def as_tensor(value: Any) -> Tensor:
    """Give a tensor itself, on whatever device; else one on the CPU, of numbers without a type in int64 or float32.

    torch's own function takes its default type and device, which belong to the caller's program.
    """
    if isinstance(value, Tensor):
        return value
    result = torch.as_tensor(value, device="cpu")
    if result.is_floating_point() and not hasattr(value, "dtype"):
        result = torch.as_tensor(value, dtype=torch.float32, device="cpu")
    return result


@contextmanager
def ordinary() -> Iterator[None]:
    """Around what libraries make: on the CPU unless they say otherwise, and no tensors of inference mode.

    It slows every call of torch inside, so it is for the making of modules, not for their work.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        yield


def own_types(device: torch.device) -> torch.autocast:
    """Inside the ``with`` block each network computes in the type of its weights."""
    return torch.autocast(device.type, enabled=False)
