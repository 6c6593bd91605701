"""The compiled library of ``csrc/``: C++ for the CPU.

It holds ``dsd_fast_cpu::…``, operators without gradients, which the operators' rooms call. It is optional: without it
the operators take another implementation.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[2]
"""The folder that the build puts the library in. Not resolved: the link dsd_fast/kernels leads out of it."""


@functools.cache
def has(operator: str) -> bool:
    """Whether the library is there and holds ``operator``: one that was built before it does not."""
    return load() and hasattr(torch.ops.dsd_fast_cpu, operator)


@functools.cache
def capability() -> str:
    """The instruction set that the library, which is loaded, takes: avx512, avx2 or baseline."""
    name: str = torch.ops.dsd_fast_cpu.capability()
    return name


@functools.cache
def load() -> bool:
    """Load the library, once; whether it is there.

    Raises:
        OSError: the library is there and cannot be loaded, for example because another torch built it.
    """
    files = sorted(PACKAGE.glob("_cpu.*so"))
    if files:
        torch.ops.load_library(str(files[0]))  # type: ignore[no-untyped-call]
    return bool(files)
