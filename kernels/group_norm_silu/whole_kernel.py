"""The form of the group norm for small images: a program holds a group of an image in registers.

One read of x and one write of y. Letters as in the kernel.py above: B images, C channels, G groups, D = C/G channels a
group, L positions. Arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Their value is no reason to compile anew.
SIZES = ["B", "G"]


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


@triton.jit
def activate_backward(b_dy, b_u, SILU: tl.constexpr):
    """dy·silu′(u), or dy."""
    if SILU:
        b_s = 1.0 / (1.0 + tl.exp(-b_u))
        b_dy = b_dy * (b_s + b_u * b_s * (1.0 - b_s))
    return b_dy


@triton.jit(do_not_specialize=SIZES)
def group_forward_kernel(
    p_y,
    p_mean,
    p_rstd,
    p_x,
    p_weight,
    p_bias,
    p_shift,
    G,
    L,
    eps,
    stride_xb,
    stride_xc,
    stride_xl,
    stride_yb,
    stride_yc,
    stride_yl,
    D: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y, mean and rstd of one group of one image."""
    i_b = (tl.program_id(0) // G).to(tl.int64)
    i_d = tl.arange(0, BLOCK_D)
    i_c = (tl.program_id(0) % G) * D + i_d
    i_l = tl.arange(0, BLOCK_L).to(tl.int64)
    keep = (i_l < L)[:, None] & (i_d < D)[None, :]
    b_x = load_image(p_x, p_shift, i_b, i_l, i_c, G * D, stride_xb, stride_xc, stride_xl, keep)
    mean = tl.sum(b_x) / (L * D)
    b_x = tl.where(keep, b_x - mean, 0.0)
    rstd = tl.math.rsqrt(tl.sum(b_x * b_x) / (L * D) + eps)
    b_u = b_x * rstd * load_channels(p_weight, i_c, G * D, 1.0) + load_channels(p_bias, i_c, G * D, 0.0)
    store_image(p_y, activate(b_u, SILU), i_b, i_l, i_c, stride_yb, stride_yc, stride_yl, keep)
    tl.store(p_mean + tl.program_id(0), mean)
    tl.store(p_rstd + tl.program_id(0), rstd)


@triton.jit(do_not_specialize=SIZES)
def group_backward_kernel(
    p_dx,
    p_sums,
    p_dshift,
    p_dy,
    p_x,
    p_mean,
    p_rstd,
    p_weight,
    p_bias,
    p_shift,
    B,
    G,
    L,
    stride_db,
    stride_dc,
    stride_dl,
    stride_yb,
    stride_yc,
    stride_yl,
    stride_xb,
    stride_xc,
    stride_xl,
    D: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx of one group of one image, dshift, and the image's sums of du and du·x̂ over positions (2, B, C)."""
    i_b = (tl.program_id(0) // G).to(tl.int64)
    i_d = tl.arange(0, BLOCK_D)
    i_c = (tl.program_id(0) % G) * D + i_d
    i_l = tl.arange(0, BLOCK_L).to(tl.int64)
    keep = (i_l < L)[:, None] & (i_d < D)[None, :]
    mean, rstd = tl.load(p_mean + tl.program_id(0)), tl.load(p_rstd + tl.program_id(0))
    b_x = load_image(p_x, p_shift, i_b, i_l, i_c, G * D, stride_xb, stride_xc, stride_xl, keep)
    b_hat = tl.where(keep, (b_x - mean) * rstd, 0.0)
    b_weight = load_channels(p_weight, i_c, G * D, 1.0)
    b_dy = load_image(p_dy, None, i_b, i_l, i_c, G * D, stride_yb, stride_yc, stride_yl, keep)
    b_du = activate_backward(b_dy, b_hat * b_weight + load_channels(p_bias, i_c, G * D, 0.0), SILU)
    b_sum, b_sum_hat = tl.sum(b_du, 0), tl.sum(b_du * b_hat, 0)
    b_g = b_du * b_weight
    b_dx = rstd * (b_g - tl.sum(b_g) / (L * D) - b_hat * (tl.sum(b_g * b_hat) / (L * D)))
    store_image(p_dx, b_dx, i_b, i_l, i_c, stride_db, stride_dc, stride_dl, keep)
    i_bc = i_b * (G * D) + i_c
    if p_sums is not None:
        tl.store(p_sums + i_bc, b_sum, mask=i_d < D)
        tl.store(p_sums + B.to(tl.int64) * (G * D) + i_bc, b_sum_hat, mask=i_d < D)
    if p_dshift is not None:
        tl.store(p_dshift + i_bc, tl.sum(tl.where(keep, b_dx, 0.0), 0), mask=i_d < D)
