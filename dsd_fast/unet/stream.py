"""Any number of rows in micro-batches that fit a memory budget."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dsd_fast.unet.cost import Memory
from dsd_fast.unet.cudagraph import held_by_recordings
from dsd_fast.unet.cut import Cut
from dsd_fast.unet.output import Output
from dsd_fast.unet.request import Request, full_bucket

log = logging.getLogger("dsd_fast")

# Share of the free memory of a GPU that a stream may take; the rest is for the allocator's fragments and workspaces.
GPU_SHARE = 0.8
# On a GPU more activations than these gain nothing.
GPU_BUDGET = 8 << 30
# Library kernels may index with 32 bits.
MOST_ELEMENTS = (1 << 31) - 1
# On a CPU more rows than these hold gain nothing and fall out of the caches.
CPU_BUDGET = 256 << 20
# What is kept for a backward pass is read once more, whatever fits the caches.
CPU_GRADIENTS = 2 << 30
# What a process holds for each byte that is in use. The CPU's heap keeps the gaps that tensors of other sizes leave.
HEADROOM = {"cpu": 4, "cuda": 1}


def default_budget(device: torch.device) -> int:
    """Bytes that texts and activations may take on ``device``: 80 % of what is free on a GPU, 256 MiB on a CPU.

    What recorded CUDA graphs hold is not free.

    ``DSD_FAST_MEMORY_BUDGET`` (bytes) overrides both.
    """
    given = os.environ.get("DSD_FAST_MEMORY_BUDGET")
    if given:
        try:
            return int(given)
        except ValueError:
            raise ValueError(f"DSD_FAST_MEMORY_BUDGET: got {given!r}, expected a number of bytes") from None
    if device.type != "cuda":
        return CPU_BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(GPU_SHARE * (free + max(0, unused - held_by_recordings(device))))


def gradient_budget(device: torch.device) -> int:
    """Bytes that activations kept for a backward pass may take on ``device``: half of what is free, 2 GiB on a CPU.

    Rounded down, so that a little more or less free memory gives the same. ``DSD_FAST_MEMORY_BUDGET`` overrides it.
    """
    if device.type != "cuda" and not os.environ.get("DSD_FAST_MEMORY_BUDGET"):
        return CPU_GRADIENTS
    return max(1, full_bucket(default_budget(device) // 2))


def rows_at_once(
    cut: Cut,
    height: int,
    width: int,
    tokens: int,
    *,
    keys: int = 0,
    map_tokens: int = 0,
    residuals: int = 0,
    memory_budget: int | None = None,
) -> int:
    """Tell how many rows one micro-batch holds.

    Args:
        cut: a plan, most often.
        height, width: of the latents.
        tokens: T.
        keys: bytes of the texts' keys and values (:meth:`Plan.text_bytes`), which a given budget includes.
        map_tokens: tokens per row of attention maps.
        residuals: bytes of a ControlNet's residuals for one row.
        memory_budget: bytes; None: the device's default, on a GPU at most 8 GiB, and one row at least.

    Raises:
        ValueError: a given budget that does not hold the keys and one row.
    """
    device = cut.network.device
    memory = Memory(cut, cut.network.sizes(height, width), tokens, map_tokens, residuals)
    gpu = device.type == "cuda"
    if memory_budget is None:
        room = cut.room(min(default_budget(device), GPU_BUDGET) if gpu else default_budget(device))
    else:
        room = memory_budget - keys
    row = memory.of(1)
    if memory_budget is not None and row > room:
        raise ValueError(
            f"memory_budget: {memory_budget:,} bytes cannot hold the texts' keys ({keys:,} bytes) and one row "
            f"({row:,} bytes)"
        )
    rows = memory.rows_within(room // HEADROOM["cuda" if gpu else "cpu"])
    if gpu:
        rows = min(rows, MOST_ELEMENTS // memory.largest)
    rows = max(1, rows)
    # A micro-batch of a whole bucket is padded with nothing.
    return full_bucket(rows) if cut.compiled else rows


def micro_batches(
    request: Request, size: int, device: torch.device, run: Callable[[Request], Output]
) -> Iterator[tuple[Tensor, Output]]:
    """Give (rows, what ``run`` answers) for the rows of a request, ``size`` at a time; see :meth:`Plan.stream`."""
    # Rows of one latent side by side: its text-free steps then run in as few micro-batches as possible.
    order = (
        torch.arange(request.rows, device="cpu")
        if request.index.latent is None
        else request.index.latent.argsort(stable=True)
    )
    start, halved = 0, False
    while start < len(order):
        rows = order[start : start + size]
        try:
            # Not around the yield: the caller's own gradients are none of our business.
            with torch.no_grad():
                result = run(request.take(rows, device, last=start + len(rows) == len(order)))
        except torch.OutOfMemoryError:
            if halved or len(rows) == 1:
                raise
            halved, size = True, len(rows) // 2
            log.warning("out of memory with %d rows in one micro-batch; going on with %d", len(rows), size)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        yield rows, result
        start += len(rows)
