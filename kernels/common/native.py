"""The compiled libraries of ``csrc/``: C++ for the CPU, CUDA C++ for GPUs.

They hold ``dsd_fast_cpu::…`` and ``dsd_fast_cuda::…``, operators without gradients, which the operators' rooms call.
Both are optional: without them the operators take another implementation.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[2]
"""The folder that the build puts the libraries in. Not resolved: the link dsd_fast/kernels leads out of it."""


@functools.cache
def load(kind: str) -> bool:
    """Load the library ``kind``, "cpu" or "cuda", once; whether it is there.

    Raises:
        OSError: the library is there and cannot be loaded, for example because another torch built it.
    """
    files = sorted(PACKAGE.glob(f"_{kind}.*so"))
    if files:
        torch.ops.load_library(str(files[0]))  # type: ignore[no-untyped-call]
    return bool(files)
