"""The forward pass of the group norm: statistics of every channel over a split, of every group, then y.

Every split gives mean and sum of squared deviations of each channel, from which those of a group follow exactly (Chan,
Golub and LeVeque, 1983); a second pass over x applies them. Letters as in the kernel.py above: B images, C channels,
G groups, D = C/G channels a group, L positions, S splits of ``split`` positions. Arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Their value is no reason to compile anew. L's is where it masks a load: a multiple of 16 keeps loads wide.
SIZES = ["B", "G", "D", "S"]


@triton.jit
def locate(C, S, BLOCK_C: tl.constexpr):
    """Image, split and channels of this program; neighbours share positions, whose channels are next to each other."""
    blocks = tl.cdiv(C, BLOCK_C)
    i_c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_bs = (tl.program_id(0) // blocks).to(tl.int64)
    return i_bs // S, i_bs % S, i_c


@triton.jit
def load_image(p_x, p_shift, i_b, i_l, i_c, C, stride_b, stride_c, stride_l, keep):
    """x + shift at positions ``i_l`` (rows) and channels ``i_c`` (columns) of image ``i_b``; 0 where not kept."""
    p_tile = p_x + i_b * stride_b + i_l[:, None] * stride_l + i_c.to(tl.int64)[None, :] * stride_c
    b_x = tl.load(p_tile, mask=keep, other=0.0).to(tl.float32)
    if p_shift is not None:
        b_shift = tl.load(p_shift + i_b * C + i_c, mask=i_c < C, other=0.0).to(tl.float32)
        b_x = tl.where(keep, b_x + b_shift[None, :], 0.0)
    return b_x


@triton.jit
def store_image(p_y, b_y, i_b, i_l, i_c, stride_b, stride_c, stride_l, keep):
    """Stores a tile like that of :func:`load_image`, in the type of what ``p_y`` points to."""
    p_tile = p_y + i_b * stride_b + i_l[:, None] * stride_l + i_c.to(tl.int64)[None, :] * stride_c
    tl.store(p_tile, b_y.to(p_y.dtype.element_ty), mask=keep)


@triton.jit
def load_channels(p_x, i_c, C, default: tl.constexpr):
    """A parameter of the channels ``i_c`` as a row; ``default`` where there is none."""
    b_x = tl.full(i_c.shape, default, tl.float32)
    if p_x is not None:
        b_x = tl.load(p_x + i_c, mask=i_c < C, other=0.0).to(tl.float32)
    return b_x[None, :]


@triton.jit
def activate(b_u, SILU: tl.constexpr):
    """silu(u), or u."""
    if SILU:
        b_u = b_u / (1.0 + tl.exp(-b_u))
    return b_u


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    p_parts,
    p_x,
    p_shift,
    B,
    C,
    L,
    S,
    split,
    stride_xb,
    stride_xc,
    stride_xl,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and sum of squared deviations of each channel over a split of ``split`` positions: parts (2, B, S, C)."""
    i_b, i_s, i_c = locate(C, S, BLOCK_C)
    end = tl.minimum((i_s + 1) * split, L)
    b_mean = tl.zeros((BLOCK_C,), tl.float32)
    b_squares = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for start in range(i_s * split, end, BLOCK_L):
        i_l = start + tl.arange(0, BLOCK_L).to(tl.int64)
        keep = (i_l < L)[:, None] & (i_c < C)[None, :]
        b_x = load_image(p_x, p_shift, i_b, i_l, i_c, C, stride_xb, stride_xc, stride_xl, keep)
        more = tl.minimum(end - start, BLOCK_L).to(tl.float32)
        b_more = tl.sum(b_x, 0) / more
        b_x = tl.where(keep, b_x - b_more[None, :], 0.0)
        b_delta = b_more - b_mean
        share = more / (count + more)
        b_squares += tl.sum(b_x * b_x, 0) + b_delta * b_delta * (count * share)
        b_mean += b_delta * share
        count += more
    i_part = (i_b * S + i_s) * C + i_c
    tl.store(p_parts + i_part, b_mean, mask=i_c < C)
    tl.store(p_parts + B.to(tl.int64) * S * C + i_part, b_squares, mask=i_c < C)


@triton.jit(do_not_specialize=[*SIZES, "L"])
def combine_kernel(p_mean, p_rstd, p_parts, B, G, D, L, S, split, eps, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mean and rstd (B, G) from the parts: squares = Σ squares_part + count_part·(mean_part − mean)²."""
    i_b = (tl.program_id(0) // G).to(tl.int64)
    i_s = tl.arange(0, BLOCK_S)
    b_count = tl.minimum(L - i_s * split, split).to(tl.float32)[:, None]
    i_row = (i_b * S + i_s)[:, None] * (G * D) + (tl.program_id(0) % G) * D
    b_sum = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D)[None, :]
        keep = (i_s < S)[:, None] & (i_d < D)
        b_sum += b_count * tl.load(p_parts + i_row + i_d, mask=keep, other=0.0)
    size = L.to(tl.float32) * D
    mean = tl.sum(b_sum) / size
    p_squares = p_parts + B.to(tl.int64) * S * (G * D)
    b_squares = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D)[None, :]
        keep = (i_s < S)[:, None] & (i_d < D)
        b_delta = tl.load(p_parts + i_row + i_d, mask=keep, other=0.0) - mean
        b_more = tl.load(p_squares + i_row + i_d, mask=keep, other=0.0)
        b_squares += b_more + tl.where(keep, b_count * b_delta * b_delta, 0.0)
    tl.store(p_mean + tl.program_id(0), mean)
    tl.store(p_rstd + tl.program_id(0), tl.math.rsqrt(tl.sum(b_squares) / size + eps))


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    p_y,
    p_mean,
    p_rstd,
    p_x,
    p_weight,
    p_bias,
    p_shift,
    G,
    C,
    D,
    L,
    stride_xb,
    stride_xc,
    stride_xl,
    stride_yb,
    stride_yc,
    stride_yl,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y from x and the statistics."""
    i_b, i_block, i_c = locate(C, tl.cdiv(L, BLOCK_L), BLOCK_C)
    i_l = i_block * BLOCK_L + tl.arange(0, BLOCK_L)
    keep = (i_l < L)[:, None] & (i_c < C)[None, :]
    b_mean = tl.load(p_mean + i_b * G + i_c // D, mask=i_c < C, other=0.0)[None, :]
    b_rstd = tl.load(p_rstd + i_b * G + i_c // D, mask=i_c < C, other=0.0)[None, :]
    b_x = load_image(p_x, p_shift, i_b, i_l, i_c, C, stride_xb, stride_xc, stride_xl, keep)
    b_u = (b_x - b_mean) * (b_rstd * load_channels(p_weight, i_c, C, 1.0)) + load_channels(p_bias, i_c, C, 0.0)
    store_image(p_y, activate(b_u, SILU), i_b, i_l, i_c, stride_yb, stride_yc, stride_yl, keep)
