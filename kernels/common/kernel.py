"""Triton functions that the attention kernels share: tiles whose sizes are sums of two powers of two.

A matrix unit works on powers of two, and a padded column costs what a real one does. So a width of 40 is a tile of 32
columns beside one of 16 with 8 masked, and 77 keys are 64 above 16. Names: ``p_`` pointers, ``i_`` indices, ``b_``
tiles. What is in parts is a list of one or two tiles, which the compiler makes a tuple, and None in a tuple is a
constant: one argument carries parts, and pointers of which some may be absent, from one function to another.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

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

START = 0.8
"""What a program takes before its first block, in blocks."""

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
    """How a kernel is launched.

    Attributes:
        block: positions.
        warps: of a program.
        stages: of the pipeline of its loads.
        resident: the programs that a multiprocessor holds at once, by architecture; None: as many as have 128
            registers a thread.
        alone: the blocks that a full multiprocessor goes through while a program that has it for itself goes through
            one; None: as many as are resident, which is so where waiting is what takes the time.
        registers: the most that a thread may have, by architecture, where one less lets one more program in.
    """

    block: int
    warps: int
    stages: int
    resident: Mapping[int, int] | None = field(default=None, compare=False, kw_only=True)
    alone: float | None = field(default=None, compare=False, kw_only=True)
    registers: Mapping[int, int] = field(default_factory=dict, compare=False, kw_only=True)


def widest(launches: Mapping[int, L], width: int) -> L:
    """The launch for heads of ``width``, of a table by the largest width that each serves."""
    return next(launch for limit, launch in launches.items() if width <= limit)


def options(launch: Launch, device: torch.device) -> dict[str, int | None]:
    """The arguments of a launch on ``device`` that it decides."""
    return {
        "BLOCK": launch.block,
        "STAGES": launch.stages,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "maxnreg": launch.registers.get(architecture(device)),
    }


def split(size: int) -> tuple[int, int]:
    """The two powers of two that hold ``size``: the largest below it, and what holds the rest; 0 for no rest."""
    first = max(SMALLEST, 1 << (size.bit_length() - 1)) if size else SMALLEST
    rest = size - first
    return first, triton.next_power_of_2(max(SMALLEST, rest)) if rest > 0 else 0


def packed(x: Tensor) -> Tensor:
    """``x`` with neighbouring columns side by side in memory; a copy only where they are not."""
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def inputs(
    q: Tensor,
    k: Tensor,
    text_index: Tensor | None,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    heads: int,
    scale: float,
) -> dict[str, Any]:
    """What each attention kernel is given of queries (B, L, H·D) and keys (M, T, H·D)."""
    rows, length, channels = q.shape
    q, k = packed(q), packed(k)
    return {
        "p_q": q,
        "p_k": k,
        "p_index": text_index,
        "p_length": text_length,
        "p_bias": None if key_bias is None else key_bias.contiguous(),
        "B": rows,
        "L": length,
        "T": k.shape[1],
        "H": heads,
        "stride_qb": q.stride(0),
        "stride_ql": q.stride(1),
        "stride_km": k.stride(0),
        "stride_kt": k.stride(1),
        "scale": scale,
        "D": channels // heads,
    }


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to ``device``, which need not be the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere, where the interpreter runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def architecture(device: torch.device) -> int:
    """The one of the architectures 80, 90 and 100, which launches are tuned for, that a device is most like."""
    # What came after Blackwell's first has multiprocessors and matrix units of Ampere's kind.
    return {9: 90, 10: 100}.get(torch.cuda.get_device_properties(device).major, 80) if device.type == "cuda" else 90


def blocks_of_span(
    device: torch.device, launch: Launch, programs: int, blocks: int, most: int | None = None, start: float = START
) -> int:
    """How many of ``blocks`` blocks a program works through, so that all programs end as early as they can.

    Args:
        device: of the launch.
        launch: of the kernel.
        programs: how many there are for each span of blocks.
        blocks: of all spans together.
        most: programs wanted for each multiprocessor, where more cost something else; None: as many as there are.
        start: what a program takes besides its blocks, in blocks.
    """
    resident = launch.resident[architecture(device)] if launch.resident else max(1, 16 // launch.warps)
    alone = launch.alone or float(resident)
    count = processors(device)
    spans = blocks if most is None else min(blocks, triton.cdiv(most * count, programs))
    return _blocks_of_span(count, resident, alone, programs, blocks, spans, start)


@functools.lru_cache(4096)
def _blocks_of_span(
    processors: int, resident: int, alone: float, programs: int, blocks: int, spans: int, start: float
) -> int:
    def time(count: int) -> float:
        # In blocks of a full processor: whole waves of programs, and the last, whose few may each be as slow as alone.
        span: int = triton.cdiv(blocks, count)
        waves, rest = divmod(triton.cdiv(blocks, span) * programs, processors * resident)
        last = max(alone, triton.cdiv(rest, processors)) if rest else 0.0
        return float((waves * resident + last) * (span + start))

    best: int = triton.cdiv(blocks, min(range(1, spans + 1), key=time))
    return best


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
    t0, t1 = split(tokens)
    known = {"D": width, "T0": t0, "T1": t1, "BLOCK": launch.block, "STAGES": launch.stages}
    values = {**dict.fromkeys(absent), **known, **constants}
    names = kernel.arg_names
    signature = {n: _argument_type(n, dtype) for n in names if n not in values}
    # Storage is aligned, and neighbouring rows are a multiple of 16 elements apart.
    divisible = frozenset(n for n in signature if n.startswith(("p_", "stride_")))
    chosen = {n: values[n] for n in names if n in values}
    return Build(name, kernel, signature, chosen, divisible, launch.warps, launch.stages, launch.registers)


def _argument_type(name: str, dtype: str) -> str:
    if name in POINTER_TYPES:
        return POINTER_TYPES[name]
    if name.startswith("p_"):
        return f"*{dtype}"
    return "fp32" if name == "scale" else "i32"


parts = triton.constexpr_function(split)
"""``split`` inside a kernel."""


class Text(NamedTuple):
    """One head of text ``i_m`` in memory: its keys and values, and what all texts have. None for what is absent."""

    p_k: Any
    p_v: Any
    p_length: Any
    p_bias: Any
    p_mask: Any
    i_m: Any
    T: Any
    stride_kt: Any
    stride_vt: Any


class Keys(NamedTuple):
    """A tile of a head's keys, at ``i_t`` in the text.

    ``bias`` is added to their logits, and for the score ``hidden`` too, in units of log 2; ``k`` and ``v`` are in
    parts. What is absent has another in its place.
    """

    i_t: Any
    bias: Any
    hidden: Any
    k: Any
    v: Any


@triton.jit
def load_columns(p_row, b_keep, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """A part of rows: SIZE columns from FIRST, of which those below D exist."""
    i_d = FIRST + tl.arange(0, SIZE)
    b_mask = b_keep[:, None] if D >= FIRST + SIZE else b_keep[:, None] & (i_d < D)[None, :]
    return tl.load(p_row + i_d[None, :], mask=b_mask, other=0.0)


@triton.jit
def store_columns(p_row, b_keep, b_x, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """As load_columns, in the type of what is pointed to."""
    i_d = FIRST + tl.arange(0, SIZE)
    b_mask = b_keep[:, None] if D >= FIRST + SIZE else b_keep[:, None] & (i_d < D)[None, :]
    tl.store(p_row + i_d[None, :], b_x.to(p_row.dtype.element_ty), mask=b_mask)


@triton.jit
def load_rows(p_x, stride, i_row, b_keep, D: tl.constexpr):
    """Rows ``i_row`` of a matrix of width D, in parts; what is not kept, and what is beyond D, is 0 and unread."""
    W: tl.constexpr = parts(D)
    p_row = p_x + i_row.to(tl.int64)[:, None] * stride
    b_x = [load_columns(p_row, b_keep, 0, W[0], D)]
    if W[1] > 0:
        b_x += [load_columns(p_row, b_keep, W[0], W[1], D)]
    return b_x


@triton.jit
def store_rows(p_x, stride, i_row, b_keep, b_x, D: tl.constexpr):
    """Stores the parts of rows, in the type of what ``p_x`` points to."""
    W: tl.constexpr = parts(D)
    p_row = p_x + i_row.to(tl.int64)[:, None] * stride
    store_columns(p_row, b_keep, b_x[0], 0, W[0], D)
    if W[1] > 0:
        store_columns(p_row, b_keep, b_x[1], W[0], W[1], D)


@triton.jit
def zero_rows(ROWS: tl.constexpr, D: tl.constexpr):
    """Sums over nothing, float32, in the parts of a width."""
    W: tl.constexpr = parts(D)
    b_x = [tl.full([ROWS, W[0]], 0.0, tl.float32)]
    if W[1] > 0:
        b_x += [tl.full([ROWS, W[1]], 0.0, tl.float32)]
    return b_x


@triton.jit
def dot_rows(b_x, b_y):
    """x yᵀ over a width in parts, float32."""
    b_xy = tl.dot(b_x[0], tl.trans(b_y[0]), input_precision="ieee")
    for i in tl.static_range(1, len(b_x)):
        b_xy = tl.dot(b_x[i], tl.trans(b_y[i]), b_xy, input_precision="ieee")
    return b_xy


@triton.jit
def add_rows(b_sum, b_w, b_x):
    """sum + w x in the parts of x's width, float32."""
    b_new = []
    for i in tl.static_range(len(b_x)):
        b_new += [tl.dot(b_w, b_x[i], b_sum[i], input_precision="ieee")]
    return b_new


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
def load_keys(text, i_t, D: tl.constexpr):
    """The keys i_t of a head: 0 and unread where their bias is −inf."""
    b_bias = key_bias(text.p_length, text.p_bias, text.i_m, i_t, text.T)
    b_hidden = b_bias
    if text.p_mask is not None:
        b_hidden = hidden_keys(text.p_mask, text.i_m, i_t, text.T)
    b_k = load_rows(text.p_k, text.stride_kt, i_t, b_bias > -INF, D)
    b_v = b_k
    if text.p_v is not None:
        b_v = load_rows(text.p_v, text.stride_vt, i_t, b_bias > -INF, D)
    return Keys(i_t, b_bias, b_hidden, b_k, b_v)


@triton.jit
def logits(b_q, b_k, b_bias, factor):
    """Logits of a tile (positions, keys), in units of log 2."""
    return dot_rows(b_q, b_k) * factor + b_bias[None, :]


@triton.jit
def row_max(b_x):
    """The largest of each row of tiles side by side."""
    b_max = tl.max(b_x[0], 1)
    for i in tl.static_range(1, len(b_x)):
        b_max = tl.maximum(b_max, tl.max(b_x[i], 1))
    return b_max


@triton.jit
def exp_rows(b_s, b_max):
    """Exponentials of tiles side by side, and the sum of each row."""
    b_p = [tl.exp2(b_s[0] - b_max[:, None])]
    b_sum = tl.sum(b_p[0], 1)
    for i in tl.static_range(1, len(b_s)):
        b_p += [tl.exp2(b_s[i] - b_max[:, None])]
        b_sum += tl.sum(b_p[i], 1)
    return b_p, b_sum


@triton.jit
def add_exp(b_max, b_sum, b_s):
    """Running maximum and sum of exponentials with one more tile, the exponentials, and what became of those before."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_safe = finite(b_new)
    b_decay = tl.exp2(b_max - b_safe)
    b_p = tl.exp2(b_s - b_safe[:, None])
    return b_new, b_sum * b_decay + tl.sum(b_p, 1), b_p, b_decay


@triton.jit
def finite(b_x):
    """0 instead of −inf, so that exp2(−inf − x) is 0 where no key exists."""
    return tl.where(b_x == -INF, 0.0, b_x)
