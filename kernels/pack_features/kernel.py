"""Feature maps into a buffer in Triton: out[rows[b]] = normalised(resized(x[b])), rounded to its type.

Letters: B maps of C channels, h × w positions, resized to H × W = L. A tile has channels, which lie side by side in
channels-last maps, and positions, which lie side by side in the buffer: loads run along the one and stores along the
other, and the tile is turned over in shared memory between them. A position is resized from up to four others, or from
a window of them, and normalised by its channels: at once where they are one tile, else in two passes over them, the
second of which the caches serve. Arithmetic is float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from dsd_fast.kernels.common.build import Build
from dsd_fast.kernels.common.kernel import on
from dsd_fast.kernels.pack_features import reference

EPS = tl.constexpr(reference.EPS)

# Channels and positions of a tile, and warps: 64 channels and 64 positions of 16 bits are rows of 128 bytes. Whole
# positions are normalised, and few of them: a store still fills a sector of 32 bytes, and small maps still are many
# programs.
PLAIN, NORMALIZED = (64, 64), (128, 16)
WARPS = 4
# The most channels that are normalised as one tile, and the warps of that.
WHOLE, WHOLE_WARPS = 512, 8

# Their value is no reason to compile anew.
SIZES = ["h", "w", "H", "W", "window_h", "window_w"]


@triton.jit
def sources(i, size, count, scale, MODE: tl.constexpr):
    """What places ``i`` of ``count`` are made of, of ``size`` places: the first, the last and the last one's weight.

    Of a window: its first place, the one behind it, and the weight of each. Places between two are computed in float32
    as torch computes them.
    """
    b_weight = tl.zeros(i.shape, tl.float32)
    if MODE == "bilinear":
        b_place = tl.maximum(scale * (i.to(tl.float32) + 0.5) - 0.5, 0.0)
        i_first = tl.minimum(b_place.to(tl.int32), size - 1)
        i_last = tl.minimum(i_first + 1, size - 1)
        b_weight = b_place - i_first.to(tl.float32)
    elif MODE == "nearest":
        i_first = tl.minimum((i.to(tl.float32) * scale).to(tl.int32), size - 1)
        i_last = i_first
    else:
        i_first = (i.to(tl.int64) * size // count).to(tl.int32)
        i_last = tl.cdiv((i.to(tl.int64) + 1) * size, count).to(tl.int32)
        b_weight = 1.0 / (i_last - i_first).to(tl.float32)
    return i_first, i_last, b_weight


@triton.jit
def load(p_x, strides, i_c, i_h, i_w, keep):
    """The tile of channels ``i_c`` (rows) and positions (``i_h``, ``i_w``) (columns) of a map; 0 where not kept."""
    stride_c, stride_h, stride_w = strides
    p_position = p_x + i_h.to(tl.int64) * stride_h + i_w.to(tl.int64) * stride_w
    return tl.load(p_position[None, :] + i_c.to(tl.int64)[:, None] * stride_c, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def resize(p_x, strides, i_c, rows, columns, window_h, window_w, keep, MODE: tl.constexpr):
    """A tile of the resized map from the :func:`sources` of its rows and columns; 0 where not kept."""
    i_h0, i_h1, b_h = rows
    i_w0, i_w1, b_w = columns
    if MODE == "nearest":
        b_y = load(p_x, strides, i_c, i_h0, i_w0, keep)
    elif MODE == "bilinear":
        b_h, b_w = b_h[None, :], b_w[None, :]
        b_00, b_01 = load(p_x, strides, i_c, i_h0, i_w0, keep), load(p_x, strides, i_c, i_h0, i_w1, keep)
        b_10, b_11 = load(p_x, strides, i_c, i_h1, i_w0, keep), load(p_x, strides, i_c, i_h1, i_w1, keep)
        b_y = (1.0 - b_h) * ((1.0 - b_w) * b_00 + b_w * b_01) + b_h * ((1.0 - b_w) * b_10 + b_w * b_11)
    else:
        b_y = tl.full(keep.shape, float("-inf") if MODE == "max" else 0.0, tl.float32)
        for i in range(window_h * window_w):
            i_h, i_w = i_h0 + i // window_w, i_w0 + i % window_w
            b_in = keep & ((i_h < i_h1) & (i_w < i_w1))[None, :]
            b_x = load(p_x, strides, i_c, i_h, i_w, b_in)
            if MODE == "max":
                b_y = tl.where(b_in, tl.maximum(b_y, b_x, propagate_nan=tl.PropagateNan.ALL), b_y)
            else:
                b_y += b_x
        b_y = tl.where(keep, b_y, 0.0) if MODE == "max" else b_y * (b_h * b_w)[None, :]
    return b_y


@triton.jit
def reciprocal_norm(b_squares):
    """1 / max(√Σ, EPS) over the channels of a tile of squares."""
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(b_squares, 0)), EPS))


@triton.jit(do_not_specialize=SIZES)
def pack_kernel(
    p_out,
    p_x,
    p_rows,
    C,
    L,
    h,
    w,
    H,
    W,
    window_h,
    window_w,
    scale_h,
    scale_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    MODE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Some positions of a map: a tile of their channels, or all of them where they are normalised.

    WHOLE: BLOCK_C holds all channels.
    """
    blocks = tl.cdiv(L, BLOCK_P)
    i_program = tl.program_id(0)
    i_p = (i_program % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    parts = 1 if NORMALIZE else tl.cdiv(C, BLOCK_C)
    i_part = i_program // blocks % parts
    i_b = (i_program // blocks // parts).to(tl.int64)
    rows = sources(i_p // W, h, H, scale_h, MODE)
    columns = sources(i_p % W, w, W, scale_w, MODE)
    p_map, strides = p_x + i_b * stride_b, (stride_c, stride_h, stride_w)
    p_row = p_out + tl.load(p_rows + i_b) * C * L + i_p
    b_factor = tl.full([BLOCK_P], 1.0, tl.float32)
    if NORMALIZE and not WHOLE:
        b_squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for i_first in range(0, C, BLOCK_C):
            i_c = i_first + tl.arange(0, BLOCK_C)
            keep = (i_c < C)[:, None] & (i_p < L)[None, :]
            b_y = resize(p_map, strides, i_c, rows, columns, window_h, window_w, keep, MODE)
            b_squares += b_y * b_y
        b_factor = reciprocal_norm(b_squares)
    i_end = C if NORMALIZE and not WHOLE else (i_part + 1) * BLOCK_C
    for i_first in range(i_part * BLOCK_C, i_end, BLOCK_C):
        i_c = i_first + tl.arange(0, BLOCK_C)
        keep = (i_c < C)[:, None] & (i_p < L)[None, :]
        b_y = resize(p_map, strides, i_c, rows, columns, window_h, window_w, keep, MODE)
        if NORMALIZE:
            if WHOLE:
                b_factor = reciprocal_norm(b_y * b_y)
            b_y *= b_factor[None, :]
        p_tile = p_row[None, :] + i_c.to(tl.int64)[:, None] * L
        tl.store(p_tile, b_y.to(p_out.dtype.element_ty), mask=keep)


def pack_features(x: Tensor, out: Tensor, rows: Tensor, mode: str, normalize: bool) -> None:
    """As reference.pack_features, of float32, float16 and bfloat16 maps and buffers; ``rows`` on x's device."""
    if not x.numel() or not out.numel():
        return
    maps, channels, h, w = x.shape
    height, width = out.shape[2:]
    if (h, w) == (height, width):
        # Each position is its own source, and read once.
        mode = "nearest"
    tile, warps = launch(channels, normalize)
    parts = 1 if normalize else triton.cdiv(channels, tile["BLOCK_C"])
    with on(x.device):
        pack_kernel[(maps * parts * triton.cdiv(height * width, tile["BLOCK_P"]),)](
            p_out=out,
            p_x=x,
            p_rows=rows.contiguous(),
            C=channels,
            L=height * width,
            h=h,
            w=w,
            H=height,
            W=width,
            window_h=_window(h, height),
            window_w=_window(w, width),
            scale_h=_scale(h, height),
            scale_w=_scale(w, width),
            stride_b=x.stride(0),
            stride_c=x.stride(1),
            stride_h=x.stride(2),
            stride_w=x.stride(3),
            MODE=mode,
            **tile,
            num_warps=warps,
        )


def launch(channels: int, normalize: bool) -> tuple[dict[str, Any], int]:
    """The tile of a program, as constants of the kernel, and its warps."""
    block_c, block_p = NORMALIZED if normalize else PLAIN
    columns = triton.next_power_of_2(channels)
    whole = normalize and channels <= WHOLE
    if whole:
        block_c = columns
    elif not normalize and columns < block_c:
        # Few channels: as many elements, but of more positions.
        block_c, block_p = columns, min(256, block_c * block_p // columns)
    warps = WHOLE_WARPS if block_c == WHOLE else WARPS
    return {"NORMALIZE": normalize, "WHOLE": whole, "BLOCK_C": block_c, "BLOCK_P": block_p}, warps


def _scale(size: int, count: int) -> float:
    """Places of the source for each one of the result, rounded to float32 as torch rounds it."""
    return float(np.float32(size) / np.float32(count))


def _window(size: int, count: int) -> int:
    """The most of ``size`` places that one of ``count`` is made of: ⌈(i + 1)·size/count⌉ − ⌊i·size/count⌋ at most."""
    return 1 + -(-(size - math.gcd(size, count)) // count)


def builds() -> list[Build]:
    """Channels-last maps of SD's widths: of any, and normalised as one tile (320) or in two passes (1280)."""
    found = []
    for dtype in ("fp16", "bf16", "fp32"):
        for mode in ("bilinear", "nearest", "area", "max"):
            for name, channels, normalize in (("plain", 1280, False), ("whole", 320, True), ("passes", 1280, True)):
                tile, warps = launch(channels, normalize)
                constants = {"stride_c": 1, "MODE": mode, **tile}
                signature = {
                    n: "*i64" if n == "p_rows" else f"*{dtype}" if n.startswith("p_") else "i32"
                    for n in pack_kernel.arg_names
                    if n not in constants
                } | {"scale_h": "fp32", "scale_w": "fp32"}
                divisible = frozenset(signature) - {*SIZES, "scale_h", "scale_w"}
                found.append(Build(f"{name} {mode} {dtype}", pack_kernel, signature, constants, divisible, warps))
    return found
