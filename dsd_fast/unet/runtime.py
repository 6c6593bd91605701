"""The runtimes that a plan can be compiled for, by name."""

from __future__ import annotations

from typing import Protocol

import torch

from dsd_fast.unet.cudagraph import CudaGraph, CudaRecorder
from dsd_fast.unet.cut import Cut
from dsd_fast.unet.execution import run_padded
from dsd_fast.unet.output import Output
from dsd_fast.unet.request import Request, bucket
from dsd_fast.unet.text import TextKV

RUNTIMES = ("inductor", "cudagraph")


class Runtime(Protocol):
    """Answers requests; see :meth:`Plan.compile`."""

    def run(self, cut: Cut, request: Request, out: Output | None) -> Output:
        """Answer ``request``, in ``out`` or in fresh tensors."""
        ...

    def held(self, text: TextKV) -> int:
        """Count the bytes that runs with ``text``, of the cut's layers alone, keep beside it."""
        ...

    def room(self, available: int) -> int:
        """Tell the bytes that a stream's activations may take where so many are available."""
        ...


class Compiled:
    """The "inductor" runtime: each region of a cut compiled by itself."""

    def run(self, cut: Cut, request: Request, out: Output | None) -> Output:
        return run_padded(cut, request, out)

    def held(self, text: TextKV) -> int:
        count = bucket(len(text))
        return 0 if count == len(text) else text.nbytes * count // max(1, len(text))

    def room(self, available: int) -> int:
        return available


def check_runtime(name: str, device: torch.device) -> None:
    """Refuse a runtime that a network on ``device`` cannot have.

    Raises:
        ValueError: an unknown name; a device that the runtime does not run on.
    """
    if name not in RUNTIMES:
        raise ValueError(f"runtime: got {name!r}, expected {' or '.join(map(repr, RUNTIMES))}")
    if name == "cudagraph" and device.type != "cuda":
        raise ValueError(f"runtime: 'cudagraph' needs a network on a CUDA device, this one is on {device}")


def make_runtime(name: str, device: torch.device) -> Runtime:
    """Make a runtime for a network on ``device``; errors as :func:`check_runtime`."""
    check_runtime(name, device)
    return Compiled() if name == "inductor" else CudaGraph(CudaRecorder(device))
