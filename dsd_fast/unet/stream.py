"""Any number of rows through a plan, in micro-batches that fit a memory budget."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsd_fast.unet import checks
from dsd_fast.unet.cost import rows_within, run_bytes
from dsd_fast.unet.request import full_bucket
from dsd_fast.unet.text import TextKV

if TYPE_CHECKING:
    from dsd_fast.unet.checks import Index, Residuals
    from dsd_fast.unet.output import Output
    from dsd_fast.unet.plan import Plan

log = logging.getLogger("dsd_fast")

# Share of the free memory of a GPU that a stream may take; the rest is for the allocator's fragments and workspaces.
GPU_SHARE = 0.8
# On a CPU more rows than these hold gain nothing and fall out of the caches.
CPU_BUDGET = 256 << 20
# What a process holds for each byte that is in use. The CPU's heap keeps the gaps that tensors of other sizes leave.
HEADROOM = {"cpu": 4, "cuda": 1}

CPU = torch.device("cpu")


def default_budget(device: torch.device) -> int:
    """Bytes that a stream's activations may take on ``device``: 80 % of what is free on a GPU, 256 MiB on a CPU.

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
    return int(GPU_SHARE * (free + unused))


def rows_at_once(
    plan: Plan,
    height: int,
    width: int,
    tokens: int,
    *,
    keys: int = 0,
    map_tokens: int = 0,
    residuals: int = 0,
    memory_budget: int | None = None,
) -> int:
    """How many rows one micro-batch holds.

    Args:
        height, width: of the latents.
        tokens: T.
        keys: bytes of the texts' keys and values (:meth:`Plan.text_bytes`), which a given budget includes.
        map_tokens: tokens per row of attention maps.
        residuals: bytes of a ControlNet's residuals for one row.
        memory_budget: bytes; None: the device's default, and one row at least.

    Raises:
        ValueError: a given budget that does not hold the keys and one row.
    """
    sizes, device = plan.program.sizes(height, width), plan.program.device
    room = default_budget(device) if memory_budget is None else memory_budget - keys
    row = run_bytes(plan, 1, sizes, tokens, map_tokens, residuals)
    if memory_budget is not None and row > room:
        raise ValueError(
            f"memory_budget: {memory_budget:,} bytes cannot hold the texts' keys ({keys:,} bytes) and one row "
            f"({row:,} bytes)"
        )
    in_use = room // HEADROOM["cuda" if device.type == "cuda" else "cpu"]
    rows = max(1, rows_within(plan, in_use, sizes, tokens, map_tokens, residuals))
    # A compiled runtime computes whole buckets: a micro-batch of that size is padded with nothing.
    return full_bucket(rows) if plan.runtime else rows


def stream(
    plan: Plan,
    latents: Tensor,
    timesteps: Tensor | Sequence[int] | int,
    text: TextKV | None,
    latent_index: Index | None,
    text_index: Index | None,
    time_ids: Tensor | None,
    residuals: Residuals | None,
    map_tokens: Tensor | Sequence[int] | None,
    memory_budget: int | None,
) -> Iterator[tuple[Tensor, Output]]:
    """See :meth:`Plan.stream`. Arguments are checked at the call, not at the first micro-batch."""
    count = len(latents)
    times = checks.timesteps(timesteps, count, CPU)
    rows = torch.arange(count) if latent_index is None else checks.index("latent_index", latent_index, None, count, CPU)
    texts = checks.text(plan, text, text_index, len(rows), CPU)
    if text is not None and texts is None:
        texts = torch.arange(len(rows))
    height, width = latents.shape[-2:]
    residuals = checks.residuals(plan, residuals, len(rows), plan.program.sizes(height, width))
    per_row = 0 if residuals is None else sum(x[:1].nbytes for x in (*residuals[0], residuals[1]))
    tokens = checks.map_tokens(plan, map_tokens, len(rows), text, CPU)
    at_once = rows_at_once(
        plan,
        height,
        width,
        0 if text is None else text.tokens,
        keys=0 if text is None else plan.text_bytes(text),
        map_tokens=0 if tokens is None else tokens.shape[1],
        residuals=per_row,
        memory_budget=memory_budget,
    )
    ids = checks.time_ids(plan, time_ids, count, CPU)
    return _batches(plan, latents, times, text, rows, texts, ids, residuals, tokens, at_once)


def _batches(
    plan: Plan,
    latents: Tensor,
    times: Tensor,
    text: TextKV | None,
    rows: Tensor,
    texts: Tensor | None,
    time_ids: Tensor | None,
    residuals: Residuals | None,
    tokens: Tensor | None,
    size: int,
) -> Iterator[tuple[Tensor, Output]]:
    device = plan.program.device
    # Rows of one latent side by side: its text-free steps then run in as few micro-batches as possible.
    order = torch.argsort(rows, stable=True)
    start, halved = 0, False
    while start < len(order):
        chosen = order[start : start + size]
        used, local = torch.unique(rows[chosen], return_inverse=True)
        try:
            # Not around the yield: the caller's own gradients are none of our business.
            with torch.no_grad():
                result = plan.run(
                    checks.upload(latents[checks.upload(used, latents.device)], device),
                    times[used],
                    text,
                    latent_index=local,
                    text_index=None if texts is None else texts[chosen],
                    time_ids=None if time_ids is None else time_ids[used],
                    residuals=_residual_rows(residuals, chosen, device),
                    map_tokens=None if tokens is None else tokens[chosen],
                )
        except torch.OutOfMemoryError:
            if halved or len(chosen) == 1:
                raise
            halved, size = True, len(chosen) // 2
            log.warning("out of memory with %d rows in one micro-batch; going on with %d", len(chosen), size)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        yield chosen, result
        start += len(chosen)


def _residual_rows(residuals: Residuals | None, rows: Tensor, device: torch.device) -> Residuals | None:
    if residuals is None:
        return None

    def chosen(value: Tensor) -> Tensor:
        return checks.upload(value[checks.upload(rows, value.device)], device)

    down, mid = residuals
    return [chosen(value) for value in down], chosen(mid)
