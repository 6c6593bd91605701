"""What is measured beside time: FLOPs, memory, and the machine's peaks to hold them against."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dsd_fast.bench.timing import Timer, cpu_timer, cuda_timer

# A matmul large enough to reach the peak, and a copy that no cache holds: side, bytes.
_SIZES = {"cpu": (1536, 256 << 20), "cuda": (8192, 1 << 30)}
_PEAK_RUNS = 7

_PROC = Path("/proc/self")


def timer_for(device: str, launches: bool = True) -> Timer:
    """The timer of a device; ``launches`` as in :func:`dsd_fast.bench.timing.cuda_timer`."""
    return cuda_timer(device, launches) if torch.device(device).type == "cuda" else cpu_timer()


def count_flops(run: Callable[[], Any]) -> tuple[Any, int]:
    """The result of ``run`` and its FLOPs, two per multiply-add, by the operators' registered formulas."""
    with FlopCounterMode(display=False, custom_mapping=_EXTRA_FORMULAS) as counter:
        result = run()
    return result, int(counter.get_total_flops())


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# torch has no formula for the attention that it runs on a CPU, and counts it as nothing.
_EXTRA_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


def peak_memory(device: str, run: Callable[[], Any]) -> int | None:
    """Bytes that ``run`` needs at its peak beyond what was in use before.

    On a GPU torch's allocations; on a CPU the growth of the process's resident memory, freed memory having been given
    back to the system before; None where the system does not tell.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # Resets the mark of the highest resident size.
        (_PROC / "clear_refs").write_text("5")
    except (OSError, AttributeError):
        run()
        return None
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = (_PROC / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peaks(device: str, dtype: str) -> dict[str, Any]:
    """FLOP/s of a large matmul and bytes/s (read and written) of a large copy, now: the best of a few runs."""
    side, size = _SIZES[torch.device(device).type]
    timer = timer_for(device, False)
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    matmul = _best(timer, lambda: a @ a)
    copy = _best(timer, lambda: target.copy_(source))
    return {"dtype": dtype, "matmul_flops": 2 * side**3 / matmul, "copy_bytes": 2 * size / copy}


def _best(timer: Timer, run: Callable[[], Any]) -> float:
    run()
    return min(timer(run) for _ in range(_PEAK_RUNS))
