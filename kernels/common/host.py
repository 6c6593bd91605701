"""What the caller's program is under (default types and devices, inference mode, autocast), kept from the answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

_HOST = torch.device("cpu")


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
    """Around what libraries make: torch's own defaults (:func:`own_defaults`), and no tensors of inference mode."""
    with torch.inference_mode(False), own_defaults():
        yield


@contextmanager
def own_defaults() -> Iterator[None]:
    """Inside the ``with`` block what says no type or device is float32 and on the CPU, as nobody's program set it.

    Where a program has set something, other threads of it find torch's default type as well, because there is one for
    all of them, and each call of torch inside is slowed.
    """
    with _DEFAULT_TYPE, nullcontext() if torch.get_default_device() == _HOST else _HOST:
        yield


class _DefaultType:
    """Float32 from the first that enters to the last that leaves, in whatever threads; then what it was."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.get_default_dtype()
                self._set()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set(self._before)

    def _set(self, dtype: torch.dtype = torch.float32) -> None:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)


_DEFAULT_TYPE = _DefaultType()


def own_types(device: torch.device) -> torch.autocast:
    """Inside the ``with`` block each network computes in the type of its weights."""
    return torch.autocast(device.type, enabled=False)
