"""Between host and device without one waiting for the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dsd_fast.kernels.common.library import traced

# What the driver stages, so that it is read when the call returns; a copy of more from pageable memory may wait for the
# stream (CUDA driver API, "API synchronization behavior").
_STAGED = 64 << 10


def upload(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Put ``value`` on ``device``, as ``dtype`` if given, without waiting for what the device is doing; differentiable.

    Host memory may be written to again as soon as the call returns. What comes from a device is waited for.
    """
    dtype = value.dtype if dtype is None else dtype
    if value.device.type != "cpu" or device.type != "cuda":
        return value.to(device, dtype)
    if not traced() and (value.numel() * dtype.itemsize > _STAGED or value.is_pinned()):
        # Pinned memory of our own: that of the caller could be overwritten before it is read.
        value = torch.empty_like(value, dtype=dtype, pin_memory=True, requires_grad=False).copy_(value)
    return value.to(dtype).to(device, non_blocking=True)


class Download:
    """Tensors on their way to host memory: from a GPU beside what it computes next.

    It holds what it copies until it is done.

    Attributes:
        beside: whether the copy goes on by itself; else the tensors were in host memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to copy ``tensors`` of one device."""
        self._read = self._copied = dict(tensors)
        device = next((value.device for value in tensors.values()), torch.device("cpu"))
        self.beside = device.type == "cuda"
        if not self.beside:
            return
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._copied = {
                name: torch.empty_like(value, device="cpu", pin_memory=True, requires_grad=False).copy_(
                    value.detach(), non_blocking=True
                )
                for name, value in self._read.items()
            }
            self._event = stream.record_event()

    def done(self) -> dict[str, Tensor]:
        """Give the tensors in host memory, once they are there."""
        if self.beside:
            self._event.synchronize()
        return self._copied


class Beside(Protocol):
    """What may go on by itself, as a :class:`Download`."""

    @property
    def beside(self) -> bool:
        """Whether it does."""
        ...


_About = TypeVar("_About")
_Copy = TypeVar("_Copy", bound=Beside)


def one_behind(copies: Iterable[tuple[_About, _Copy]]) -> Iterator[tuple[_About, _Copy]]:
    """Give what was begun in its order, a copy that goes on by itself once the next one has been begun."""
    waiting: tuple[_About, _Copy] | None = None
    for about, copy in copies:
        if waiting is not None:
            yield waiting
        waiting = (about, copy) if copy.beside else None
        if waiting is None:
            yield about, copy
    if waiting is not None:
        yield waiting
