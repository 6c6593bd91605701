"""Triton functions that the attention kernels share: tiles whose sizes are sums of two powers of two.

A matrix unit works on powers of two, and a padded column costs what a real one does. So a width of 40 is a tile of 32
columns beside one of 16 with 8 masked, and 77 keys are 64 above 16. Names: ``p_`` pointers, ``i_`` indices, ``b_``
tiles; a pair ``b_x0, b_x1`` holds the two parts of a width, and the second stands for nothing where its size is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsd_fast.kernels.common.build import Build

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))

SIZES = ["B", "L", "T", "H", "span"]
"""Arguments whose value is no reason to compile anew: 1, or a multiple of 16, is as good as any other."""

PROGRAMS_PER_PROCESSOR = 16
"""Programs wanted for each multiprocessor: a few waves of those that are resident, so that the last costs little."""

WIDTHS = (40, 64, 80, 128, 160)
"""Head widths of SD 1.5 (40, 80, 160), SD 2.x and SDXL (64), and of others that take 128."""

POINTER_TYPES = {
    "p_index": "*i64",
    "p_length": "*i64",
    "p_bias": "*fp32",
    "p_mask": "*i1",
    "p_score": "*fp32",
    "p_saved": "*fp32",
    "p_dscore": "*fp32",
    "p_dk": "*fp32",
    "p_dv": "*fp32",
    "p_dbias": "*fp32",
    "p_delta": "*fp32",
    "p_new_delta": "*fp32",
    "p_tokens": "*i64",
    "p_maps": "*fp32",
}
"""Types of the pointers that do not follow the type of the queries."""

WHOLE = 128
"""The most keys that are one tile."""

SMALLEST = 16
"""The least size that the matrix units take in every dimension."""


L = TypeVar("L", bound="Launch")


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: positions a block, warps, and stages of the pipeline of its loads."""

    block: int
    warps: int
    stages: int


def widest(launches: Mapping[int, L], width: int) -> L:
    """The launch for heads of ``width``, of a table by the largest width that each serves."""
    return next(launch for limit, launch in launches.items() if width <= limit)


def options(launch: Launch) -> dict[str, int]:
    """The arguments of a launch that it decides."""
    return {
        "BLOCK": launch.block,
        "STAGES": launch.stages,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


def split(size: int) -> tuple[int, int]:
    """The two powers of two that hold ``size``: the largest below it, and what holds the rest; 0 for no rest."""
    first = max(SMALLEST, 1 << (size.bit_length() - 1)) if size else SMALLEST
    rest = size - first
    return first, triton.next_power_of_2(max(SMALLEST, rest)) if rest > 0 else 0


def packed(x: Tensor) -> Tensor:
    """``x`` with neighbouring columns side by side in memory; a copy only where they are not."""
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to ``device``, which need not be the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere, where the interpreter runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def span_count(device: torch.device, programs: int, blocks: int, wanted: int = PROGRAMS_PER_PROCESSOR) -> int:
    """In how many spans ``blocks`` blocks are worked through, so that ``programs`` times as many fill the GPU."""
    wanted = triton.cdiv(wanted * processors(device), programs)
    return max(1, min(blocks, wanted))


def build(
    name: str,
    kernel: Any,
    dtype: str,
    launch: Launch,
    absent: Set[str],
    *,
    width: int,
    tokens: int,
    **constants: Any,
) -> Build:
    """What a launch compiles of one of the attention kernels.

    Args:
        name: of the configuration.
        kernel: the jit function.
        dtype: "bf16" or "fp16", the type of queries, keys, values and their gradients.
        launch: its launch.
        absent: the pointers that are None.
        width, tokens: D and T.
        constants: constexpr arguments beyond those of the tiles.
    """
    d0, d1 = split(width)
    t0, t1 = split(tokens)
    known = {"D": width, "D0": d0, "D1": d1, "T0": t0, "T1": t1, "BLOCK": launch.block, "STAGES": launch.stages}
    values = {**dict.fromkeys(absent), **known, **constants}
    names = kernel.arg_names
    signature = {n: _argument_type(n, dtype) for n in names if n not in values}
    # Storage is aligned, and neighbouring rows are a multiple of 16 elements apart.
    divisible = frozenset(n for n in signature if n.startswith(("p_", "stride_")))
    chosen = {n: values[n] for n in names if n in values}
    return Build(name, kernel, signature, chosen, divisible, launch.warps, launch.stages)


def _argument_type(name: str, dtype: str) -> str:
    if name in POINTER_TYPES:
        return POINTER_TYPES[name]
    if name.startswith("p_"):
        return f"*{dtype}"
    return "fp32" if name == "scale" else "i32"


@triton.jit
def load_rows(p_x, stride, i_row, b_keep, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows ``i_row`` of a matrix of width D in two parts; what is not kept, and what is beyond D, is 0 and unread."""
    p_row = p_x + i_row.to(tl.int64)[:, None] * stride
    i_d = tl.arange(0, D0)
    b_mask = b_keep[:, None] if D >= D0 else b_keep[:, None] & (i_d < D)[None, :]
    b_x0 = tl.load(p_row + i_d[None, :], mask=b_mask, other=0.0)
    b_x1 = b_x0
    if D1 > 0:
        i_d1 = D0 + tl.arange(0, D1)
        b_mask1 = b_keep[:, None] if D == D0 + D1 else b_keep[:, None] & (i_d1 < D)[None, :]
        b_x1 = tl.load(p_row + i_d1[None, :], mask=b_mask1, other=0.0)
    return b_x0, b_x1


@triton.jit
def store_rows(p_x, stride, i_row, b_keep, b_x0, b_x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Stores the two parts of rows, in the type of what ``p_x`` points to."""
    p_row = p_x + i_row.to(tl.int64)[:, None] * stride
    i_d = tl.arange(0, D0)
    b_mask = b_keep[:, None] if D >= D0 else b_keep[:, None] & (i_d < D)[None, :]
    tl.store(p_row + i_d[None, :], b_x0.to(p_x.dtype.element_ty), mask=b_mask)
    if D1 > 0:
        i_d1 = D0 + tl.arange(0, D1)
        b_mask1 = b_keep[:, None] if D == D0 + D1 else b_keep[:, None] & (i_d1 < D)[None, :]
        tl.store(p_row + i_d1[None, :], b_x1.to(p_x.dtype.element_ty), mask=b_mask1)


@triton.jit
def dot_rows(b_x0, b_x1, b_y0, b_y1, D1: tl.constexpr):
    """x yᵀ over a width in two parts, float32."""
    b_xy = tl.dot(b_x0, tl.trans(b_y0), input_precision="ieee")
    if D1 > 0:
        b_xy = tl.dot(b_x1, tl.trans(b_y1), b_xy, input_precision="ieee")
    return b_xy


@triton.jit
def text_of(p_index, i_b):
    """The text of a row, int64; its own number without an index."""
    i_m = i_b
    if p_index is not None:
        i_m = tl.load(p_index + i_b).to(tl.int64)
    return i_m


@triton.jit
def key_bias(p_length, p_bias, i_m, i_t, T):
    """What is added to the logits, in units of log 2: −inf for keys that do not exist, else their bias."""
    exists = i_t < T
    if p_length is not None:
        exists = exists & (i_t < tl.load(p_length + i_m))
    b_bias = tl.where(exists, 0.0, -INF)
    if p_bias is not None:
        b_bias = tl.load(p_bias + i_m * T + i_t, mask=exists, other=-INF).to(tl.float32) * LOG2E
    return b_bias


@triton.jit
def hidden_keys(p_mask, i_m, i_t, T):
    """What is added to the logits of the score: −inf for the keys that it does not count, else 0."""
    b_mask = tl.load(p_mask + i_m * T + i_t, mask=i_t < T, other=0)
    return tl.where(b_mask != 0, 0.0, -INF)


@triton.jit
def finite(b_x):
    """0 instead of −inf, so that exp2(−inf − x) is 0 where no key exists."""
    return tl.where(b_x == -INF, 0.0, b_x)


@triton.jit
def store_sum(p_sum, b_x, b_keep, SIZE: tl.constexpr):
    """Stores the sum of what is kept of a vector."""
    # The last of the running sums: a sum over a vector that comes of row-wise sums does not compile for sm_100.
    b_sum = tl.cumsum(tl.where(b_keep, b_x, 0.0), 0)
    i_x = tl.arange(0, SIZE)
    tl.store(p_sum + i_x * 0, b_sum, mask=i_x == SIZE - 1)
