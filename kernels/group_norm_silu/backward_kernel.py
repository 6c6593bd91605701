"""The backward pass of the group norm: sums of every channel over a split, of every group, then dx.

Letters as in the kernel.py above. With x̂ = (x + shift − mean)·rstd and u = x̂·weight + bias, du is the gradient of u and
g = du·weight that of x̂. Arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsd_fast.kernels.group_norm_silu.forward_kernel import SIZES, load_channels, load_image, locate, store_image


@triton.jit
def activate_backward(b_dy, b_u, SILU: tl.constexpr):
    """dy·silu′(u), or dy."""
    if SILU:
        b_s = 1.0 / (1.0 + tl.exp(-b_u))
        b_dy = b_dy * (b_s + b_u * b_s * (1.0 - b_s))
    return b_dy


@triton.jit(do_not_specialize=SIZES)
def channel_gradients_kernel(
    p_parts,
    p_dy,
    p_x,
    p_mean,
    p_rstd,
    p_weight,
    p_bias,
    p_shift,
    B,
    G,
    C,
    D,
    L,
    S,
    split,
    stride_yb,
    stride_yc,
    stride_yl,
    stride_xb,
    stride_xc,
    stride_xl,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of du, of du·x̂ and of x̂ of each channel over a split: parts (3, B, S, C)."""
    i_b, i_s, i_c = locate(C, S, BLOCK_C)
    end = tl.minimum((i_s + 1) * split, L)
    b_mean = tl.load(p_mean + i_b * G + i_c // D, mask=i_c < C, other=0.0)[None, :]
    b_rstd = tl.load(p_rstd + i_b * G + i_c // D, mask=i_c < C, other=0.0)[None, :]
    b_weight, b_bias = load_channels(p_weight, i_c, C, 1.0), load_channels(p_bias, i_c, C, 0.0)
    b_sum = tl.zeros((BLOCK_C,), tl.float32)
    b_sum_hat = tl.zeros((BLOCK_C,), tl.float32)
    b_hats = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(i_s * split, end, BLOCK_L):
        i_l = start + tl.arange(0, BLOCK_L).to(tl.int64)
        keep = (i_l < L)[:, None] & (i_c < C)[None, :]
        b_x = load_image(p_x, p_shift, i_b, i_l, i_c, C, stride_xb, stride_xc, stride_xl, keep)
        b_dy = load_image(p_dy, None, i_b, i_l, i_c, C, stride_yb, stride_yc, stride_yl, keep)
        b_hat = tl.where(keep, (b_x - b_mean) * b_rstd, 0.0)
        b_du = activate_backward(b_dy, b_hat * b_weight + b_bias, SILU)
        b_sum += tl.sum(b_du, 0)
        b_sum_hat += tl.sum(b_du * b_hat, 0)
        b_hats += tl.sum(b_hat, 0)
    i_part = (i_b * S + i_s) * C + i_c
    plane = B.to(tl.int64) * S * C
    tl.store(p_parts + i_part, b_sum, mask=i_c < C)
    tl.store(p_parts + plane + i_part, b_sum_hat, mask=i_c < C)
    if p_shift is not None:
        tl.store(p_parts + 2 * plane + i_part, b_hats, mask=i_c < C)


@triton.jit(do_not_specialize=[*SIZES, "L"])
def combine_gradients_kernel(
    p_means,
    p_sums,
    p_dshift,
    p_parts,
    p_rstd,
    p_weight,
    B,
    G,
    D,
    L,
    S,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The means of g and g·x̂ over a group (2, B, G); sums of du and du·x̂ (2, B, C) and dshift (B, C) if wanted."""
    i_b, i_g = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    C = G * D
    plane, image = B.to(tl.int64) * S * C, B.to(tl.int64) * C
    i_s = tl.arange(0, BLOCK_S)[:, None]
    i_row = (i_b * S + i_s) * C + i_g * D
    b_g = tl.zeros((BLOCK_D,), tl.float32)
    b_g_hat = tl.zeros((BLOCK_D,), tl.float32)
    for d in range(0, D, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D)
        keep = (i_s < S) & (i_d < D)[None, :]
        b_sum = tl.sum(tl.load(p_parts + i_row + i_d[None, :], mask=keep, other=0.0), 0)
        b_sum_hat = tl.sum(tl.load(p_parts + plane + i_row + i_d[None, :], mask=keep, other=0.0), 0)
        if p_sums is not None:
            i_bc = i_b * C + i_g * D + i_d
            tl.store(p_sums + i_bc, b_sum, mask=i_d < D)
            tl.store(p_sums + image + i_bc, b_sum_hat, mask=i_d < D)
        b_weight = tl.full((BLOCK_D,), 1.0, tl.float32)
        if p_weight is not None:
            b_weight = tl.load(p_weight + i_g * D + i_d, mask=i_d < D, other=0.0).to(tl.float32)
        b_g += b_sum * b_weight
        b_g_hat += b_sum_hat * b_weight
    size = L.to(tl.float32) * D
    mean, mean_hat = tl.sum(b_g) / size, tl.sum(b_g_hat) / size
    tl.store(p_means + tl.program_id(0), mean)
    tl.store(p_means + B.to(tl.int64) * G + tl.program_id(0), mean_hat)
    if p_dshift is not None:
        rstd = tl.load(p_rstd + tl.program_id(0))
        for d in range(0, D, BLOCK_D):
            i_d = d + tl.arange(0, BLOCK_D)
            keep = (i_s < S) & (i_d < D)[None, :]
            b_hats = tl.sum(tl.load(p_parts + 2 * plane + i_row + i_d[None, :], mask=keep, other=0.0), 0)
            b_g = tl.sum(tl.load(p_parts + i_row + i_d[None, :], mask=keep, other=0.0), 0)
            if p_weight is not None:
                b_g *= tl.load(p_weight + i_g * D + i_d, mask=i_d < D, other=0.0).to(tl.float32)
            b_dshift = rstd * (b_g - L * mean - b_hats * mean_hat)
            tl.store(p_dshift + i_b * C + i_g * D + i_d, b_dshift, mask=i_d < D)


@triton.jit(do_not_specialize=SIZES)
def apply_gradients_kernel(
    p_dx,
    p_means,
    p_dy,
    p_x,
    p_mean,
    p_rstd,
    p_weight,
    p_bias,
    p_shift,
    B,
    G,
    C,
    D,
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
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx from dy, x, the statistics and the means of g and g·x̂."""
    i_b, i_block, i_c = locate(C, tl.cdiv(L, BLOCK_L), BLOCK_C)
    i_l = i_block * BLOCK_L + tl.arange(0, BLOCK_L)
    keep = (i_l < L)[:, None] & (i_c < C)[None, :]
    i_bg = i_b * G + i_c // D
    b_mean = tl.load(p_mean + i_bg, mask=i_c < C, other=0.0)[None, :]
    b_rstd = tl.load(p_rstd + i_bg, mask=i_c < C, other=0.0)[None, :]
    b_g_mean = tl.load(p_means + i_bg, mask=i_c < C, other=0.0)[None, :]
    b_g_hat_mean = tl.load(p_means + B.to(tl.int64) * G + i_bg, mask=i_c < C, other=0.0)[None, :]
    b_x = load_image(p_x, p_shift, i_b, i_l, i_c, C, stride_xb, stride_xc, stride_xl, keep)
    b_dy = load_image(p_dy, None, i_b, i_l, i_c, C, stride_yb, stride_yc, stride_yl, keep)
    b_hat = (b_x - b_mean) * b_rstd
    b_weight = load_channels(p_weight, i_c, C, 1.0)
    b_du = activate_backward(b_dy, b_hat * b_weight + load_channels(p_bias, i_c, C, 0.0), SILU)
    b_dx = b_rstd * (b_du * b_weight - b_g_mean - b_hat * b_g_hat_mean)
    store_image(p_dx, b_dx, i_b, i_l, i_c, stride_db, stride_dc, stride_dl, keep)
