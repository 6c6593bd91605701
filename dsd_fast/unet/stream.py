"""Any number of rows through a plan, in micro-batches that fit a memory budget."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsd_fast.unet.text import TextKV

if TYPE_CHECKING:
    from dsd_fast.unet.checks import Index, Residuals
    from dsd_fast.unet.output import Output
    from dsd_fast.unet.plan import Plan

log = logging.getLogger("dsd_fast")

# Share of the free memory of a GPU that a stream may take; the rest is for the allocator's fragments and workspaces.
GPU_SHARE = 0.8
# On a CPU rows beyond this gain nothing and fall out of the caches.
CPU_BUDGET = 256 << 20


def default_budget(device: torch.device) -> int:
    """Bytes that :meth:`Plan.stream` may use on ``device``: 80 % of what is free on a GPU, 256 MiB on a CPU.

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


def rows_in_budget(plan: Plan, height: int, width: int, text: TextKV | None, budget: int, *, map_tokens: int) -> int:
    """How many rows one micro-batch may hold, the texts' keys counted in the budget.

    Raises:
        ValueError: the budget does not hold the texts and one row.
    """
    keys = 0 if text is None else text.nbytes
    per_row = plan.row_bytes(height, width, 0 if text is None else text.tokens, map_tokens=map_tokens)
    if keys + per_row > budget:
        raise ValueError(
            f"memory_budget: {budget:,} bytes cannot hold the keys of {0 if text is None else len(text)} texts "
            f"({keys:,} bytes) and one row ({per_row:,} bytes)"
        )
    return (budget - keys) // per_row


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
    """See :meth:`Plan.stream`."""
    device = plan.program.unet.device
    count = len(latents)
    times = torch.as_tensor(timesteps).expand(count)
    rows = torch.arange(count) if latent_index is None else torch.as_tensor(latent_index).cpu().long()
    texts = None
    if text is not None:
        texts = torch.arange(len(text)) if text_index is None else torch.as_tensor(text_index).cpu().long()
        if len(texts) != len(rows):
            raise ValueError(f"text_index: got {len(texts)} entries for {len(rows)} rows")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise ValueError(f"latent_index: values outside 0 to {count - 1}")
    tokens = None if map_tokens is None else torch.as_tensor(map_tokens)
    budget = default_budget(device) if memory_budget is None else memory_budget
    height, width = latents.shape[-2:]
    size = rows_in_budget(plan, height, width, text, budget, map_tokens=0 if tokens is None else tokens.shape[-1])
    # Rows of one latent side by side: its text-free steps then run in as few micro-batches as possible.
    order = torch.argsort(rows, stable=True)
    start, halved = 0, False
    with torch.no_grad():
        while start < len(order):
            chosen = order[start : start + size]
            used, local = torch.unique(rows[chosen], return_inverse=True)
            ids = time_ids if time_ids is None or time_ids.ndim == 1 else time_ids[used.to(time_ids.device)]
            try:
                result = plan.run(
                    latents[used.to(latents.device)].to(device),
                    times[used.to(times.device)],
                    text,
                    latent_index=local,
                    text_index=None if texts is None else texts[chosen],
                    time_ids=ids,
                    residuals=_residual_rows(residuals, chosen),
                    map_tokens=tokens if tokens is None or tokens.ndim == 1 else tokens[chosen],
                )
            except torch.OutOfMemoryError:
                if halved or size == 1:
                    raise
                halved, size = True, max(1, len(chosen) // 2)
                log.warning("out of memory with %d rows in one micro-batch; going on with %d", len(chosen), size)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            yield chosen, result
            start += len(chosen)


def _residual_rows(residuals: Residuals | None, rows: Tensor) -> Residuals | None:
    if residuals is None:
        return None
    down, mid = residuals
    return [value[rows.to(value.device)] for value in down], mid[rows.to(mid.device)]
