"""Cross-attention with its score, backward: the gradient of the queries, and what all gradients share.

    dS = P (dP − δ) + P_scored · dlse     dP[t] = dO·v[t]     δ = Σ_t P dP     dq = scale · dS k

Letters: B rows, M texts, H heads, D head width, L image positions, T text tokens. P is made again from q, k and the
saved log-sum-exp. Everything is float32 but the operands of products, which have q's type.

Maps of tokens are attention to values of 0 and 1: map n shows v[t, n] = 1 where t is token n. Their backward pass is
this one, with dP taken from the maps' gradients (``p_tokens`` instead of ``p_v``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsd_fast.kernels.common.kernel import (
    INF,
    LOG2E,
    SIZES,
    dot_rows,
    finite,
    hidden_keys,
    key_bias,
    load_rows,
    store_rows,
    text_of,
)

MAPS = tl.constexpr(16)
"""Maps whose gradients are taken at once."""


@triton.jit
def map_gradient(p_dmap, p_tokens, i_b, i_rows, b_keep, i_t, n, L, H, b_dp, DTYPE: tl.constexpr):
    """dP of a tile (positions, keys): the gradients of the maps that show a key, over H. b_dp is 0."""
    for i_n in range(0, n, MAPS):
        i_map = i_n + tl.arange(0, MAPS)
        b_token = tl.load(p_tokens + i_b * n + i_map, mask=i_map < n, other=-1)
        b_shown = (b_token[:, None] == i_t[None, :]).to(DTYPE)
        p_row = p_dmap + (i_b * n + i_map)[None, :] * tl.cast(L, tl.int64) + i_rows[:, None]
        b_dmap = tl.load(p_row, mask=(i_map < n)[None, :] & b_keep[:, None], other=0.0)
        b_dp = tl.dot(b_dmap.to(DTYPE), b_shown, b_dp, input_precision="ieee")
    return b_dp / H


@triton.jit
def logit_gradient(p_dout, p_dscore, p_mask, b_s, b_p, b_dp, b_delta, b_hidden, b_scored, b_dlse):
    """dS of a tile (positions, keys), from logits and log-sum-exps in units of log 2."""
    b_ds = b_p
    if p_dscore is None:
        b_ds = b_p * (b_dp - b_delta[:, None])
    elif p_mask is not None:
        b_ds = tl.exp2(b_s + b_hidden[None, :] - b_scored[:, None]) * b_dlse[:, None]
        if p_dout is not None:
            b_ds += b_p * (b_dp - b_delta[:, None])
    elif p_dout is not None:
        b_ds = b_p * (b_dp + (b_dlse - b_delta)[:, None])
    else:
        b_ds = b_p * b_dlse[:, None]
    return b_ds


@triton.jit
def position_gradients(p_saved, p_dscore, p_dout, p_mask, i_row, i_at, b_keep, B, L, H, MEAN: tl.constexpr):
    """lse of all and of the scored keys, in units of log 2, and dlse. Positions beyond the last have P = 0."""
    b_lse = finite(tl.load(p_saved + i_at, mask=b_keep, other=INF)) * LOG2E
    b_scored = b_lse
    b_dlse = b_lse
    if p_dscore is not None:
        if p_mask is not None:
            p_scored = p_saved + tl.cast(B, tl.int64) * H * L + i_at
            b_scored = finite(tl.load(p_scored, mask=b_keep, other=INF)) * LOG2E
        if MEAN:
            b_dlse = tl.where(b_keep, tl.load(p_dscore + i_row), 0.0)
            if p_dout is not None:
                b_dlse = b_dlse / L
        else:
            b_dlse = tl.load(p_dscore + i_at, mask=b_keep, other=0.0)
    return b_lse, b_scored, b_dlse


@triton.jit
def gradient_scale(p_dout, scale, L, MEAN: tl.constexpr):
    """The factor of the sums of dS: 1 / L of a mean alone comes last, so that 16-bit products do not underflow."""
    size = tl.cast(scale, tl.float32)
    if MEAN and p_dout is None:
        size = size / L
    return size


@triton.jit
def load_keys(
    p_km,
    p_vm,
    p_v,
    p_length,
    p_bias,
    p_mask,
    i_m,
    i_t,
    T,
    stride_kt,
    stride_vt,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    """Of keys i_t: bias, what the score adds to it, keys and values; without values or a mask others in their place."""
    b_a = key_bias(p_length, p_bias, i_m, i_t, T)
    b_h = b_a
    if p_mask is not None:
        b_h = hidden_keys(p_mask, i_m, i_t, T)
    b_k0, b_k1 = load_rows(p_km, stride_kt, i_t, b_a > -INF, D, D0, D1)
    b_v0, b_v1 = b_k0, b_k1
    if p_v is not None:
        b_v0, b_v1 = load_rows(p_vm, stride_vt, i_t, b_a > -INF, D, D0, D1)
    return b_a, b_h, b_k0, b_k1, b_v0, b_v1


@triton.jit
def tile_gradients(
    p_dout,
    p_dscore,
    p_mask,
    p_v,
    p_tokens,
    b_q0,
    b_q1,
    b_k0,
    b_k1,
    b_do0,
    b_do1,
    b_v0,
    b_v1,
    b_a,
    b_lse,
    factor,
    i_b,
    i_rows,
    b_keep,
    i_t,
    n,
    L,
    H,
    DTYPE: tl.constexpr,
    D1: tl.constexpr,
):
    """S in units of log 2, P and dP of a tile (positions, keys); dP is P where there is no dO."""
    b_s = dot_rows(b_q0, b_q1, b_k0, b_k1, D1) * factor + b_a[None, :]
    b_p = tl.exp2(b_s - b_lse[:, None])
    b_dp = b_p
    if p_dout is not None:
        if p_v is not None:
            b_dp = dot_rows(b_do0, b_do1, b_v0, b_v1, D1)
        else:
            b_dp = map_gradient(p_dout, p_tokens, i_b, i_rows, b_keep, i_t, n, L, H, b_p * 0.0, DTYPE)
    return b_s, b_p, b_dp


@triton.jit(do_not_specialize=[*SIZES, "n"])
def query_kernel(
    p_dq,
    p_new_delta,
    p_dout,
    p_dscore,
    p_q,
    p_k,
    p_v,
    p_tokens,
    p_index,
    p_length,
    p_bias,
    p_mask,
    p_saved,
    B,
    L,
    T,
    H,
    n,
    span,
    stride_ob,
    stride_ol,
    stride_qb,
    stride_ql,
    stride_km,
    stride_kt,
    stride_vm,
    stride_vt,
    scale,
    MEAN: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """T ≤ T0 + T1: dq and δ of a span of positions. Program (span, row, head), heads fastest.

    p_dq (B, L, H·D) or None; p_new_delta (B, H, L) or None; p_dout as q, with p_tokens (B, n) the maps' gradient
    (B, n, L), or None; p_dscore (B, H, L), with MEAN (B, H), or None. The rest as in forward_kernel.
    """
    i_p = tl.program_id(0)
    i_h, i_b, i_s = (i_p % H).to(tl.int64), (i_p // H % B).to(tl.int64), i_p // H // B
    i_m = text_of(p_index, i_b)
    i_row = i_b * H + i_h
    factor = tl.cast(scale, tl.float32) * LOG2E
    size = gradient_scale(p_dout, scale, L, MEAN)
    DTYPE: tl.constexpr = p_q.dtype.element_ty

    i_t0 = tl.arange(0, T0)
    p_km = p_k + i_m * stride_km + i_h * D
    p_vm = p_km
    if p_v is not None:
        p_vm = p_v + i_m * stride_vm + i_h * D
    b_a0, b_h0, b_k00, b_k01, b_v00, b_v01 = load_keys(
        p_km, p_vm, p_v, p_length, p_bias, p_mask, i_m, i_t0, T, stride_kt, stride_vt, D, D0, D1
    )
    if T1 > 0:
        i_t1 = T0 + tl.arange(0, T1)
        b_a1, b_h1, b_k10, b_k11, b_v10, b_v11 = load_keys(
            p_km, p_vm, p_v, p_length, p_bias, p_mask, i_m, i_t1, T, stride_kt, stride_vt, D, D0, D1
        )

    p_qb = p_q + i_b * stride_qb + i_h * D
    for i_l in tl.range(i_s * span, tl.minimum(L, (i_s + 1) * span), BLOCK, num_stages=STAGES):
        i_rows = i_l + tl.arange(0, BLOCK)
        b_keep = i_rows < L
        i_at = i_row * L + i_rows
        b_q0, b_q1 = load_rows(p_qb, stride_ql, i_rows, b_keep, D, D0, D1)
        b_do0, b_do1 = b_q0, b_q1
        if p_v is not None:
            b_do0, b_do1 = load_rows(p_dout + i_b * stride_ob + i_h * D, stride_ol, i_rows, b_keep, D, D0, D1)
        b_lse, b_scored, b_dlse = position_gradients(
            p_saved, p_dscore, p_dout, p_mask, i_row, i_at, b_keep, B, L, H, MEAN
        )
        b_s0, b_p0, b_dp0 = tile_gradients(
            p_dout,
            p_dscore,
            p_mask,
            p_v,
            p_tokens,
            b_q0,
            b_q1,
            b_k00,
            b_k01,
            b_do0,
            b_do1,
            b_v00,
            b_v01,
            b_a0,
            b_lse,
            factor,
            i_b,
            i_rows,
            b_keep,
            i_t0,
            n,
            L,
            H,
            DTYPE,
            D1,
        )
        b_delta = tl.sum(b_p0 * b_dp0, 1)
        if T1 > 0:
            b_s1, b_p1, b_dp1 = tile_gradients(
                p_dout,
                p_dscore,
                p_mask,
                p_v,
                p_tokens,
                b_q0,
                b_q1,
                b_k10,
                b_k11,
                b_do0,
                b_do1,
                b_v10,
                b_v11,
                b_a1,
                b_lse,
                factor,
                i_b,
                i_rows,
                b_keep,
                i_t1,
                n,
                L,
                H,
                DTYPE,
                D1,
            )
            b_delta += tl.sum(b_p1 * b_dp1, 1)
        if p_new_delta is not None:
            tl.store(p_new_delta + i_at, b_delta, mask=b_keep)
        if p_dq is not None:
            b_ds0 = logit_gradient(p_dout, p_dscore, p_mask, b_s0, b_p0, b_dp0, b_delta, b_h0, b_scored, b_dlse).to(
                DTYPE
            )
            b_dq0 = tl.dot(b_ds0, b_k00, input_precision="ieee")
            b_dq1 = b_dq0
            if D1 > 0:
                b_dq1 = tl.dot(b_ds0, b_k01, input_precision="ieee")
            if T1 > 0:
                b_ds1 = logit_gradient(p_dout, p_dscore, p_mask, b_s1, b_p1, b_dp1, b_delta, b_h1, b_scored, b_dlse).to(
                    DTYPE
                )
                b_dq0 = tl.dot(b_ds1, b_k10, b_dq0, input_precision="ieee")
                if D1 > 0:
                    b_dq1 = tl.dot(b_ds1, b_k11, b_dq1, input_precision="ieee")
            p_dqb = p_dq + (i_b * L * H + i_h) * D
            store_rows(p_dqb, tl.cast(H, tl.int64) * D, i_rows, b_keep, b_dq0 * size, b_dq1 * size, D, D0, D1)


@triton.jit(do_not_specialize=[*SIZES, "n"])
def query_loop_kernel(
    p_dq,
    p_new_delta,
    p_dout,
    p_dscore,
    p_q,
    p_k,
    p_v,
    p_tokens,
    p_index,
    p_length,
    p_bias,
    p_mask,
    p_saved,
    B,
    L,
    T,
    H,
    n,
    stride_ob,
    stride_ol,
    stride_qb,
    stride_ql,
    stride_km,
    stride_kt,
    stride_vm,
    stride_vt,
    scale,
    MEAN: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    T0: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Any T: as query_kernel for a block of queries, which streams tiles of T0 keys: once for δ and once for dq."""
    i_p = tl.program_id(0)
    i_h, i_b, i_n = (i_p % H).to(tl.int64), (i_p // H % B).to(tl.int64), i_p // H // B
    i_m = text_of(p_index, i_b)
    i_row = i_b * H + i_h
    factor = tl.cast(scale, tl.float32) * LOG2E
    size = gradient_scale(p_dout, scale, L, MEAN)
    DTYPE: tl.constexpr = p_q.dtype.element_ty
    i_rows = i_n * BLOCK + tl.arange(0, BLOCK)
    b_keep = i_rows < L
    i_at = i_row * L + i_rows
    b_q0, b_q1 = load_rows(p_q + i_b * stride_qb + i_h * D, stride_ql, i_rows, b_keep, D, D0, D1)
    b_do0, b_do1 = b_q0, b_q1
    p_km = p_k + i_m * stride_km + i_h * D
    p_vm = p_km
    if p_v is not None:
        p_vm = p_v + i_m * stride_vm + i_h * D
        b_do0, b_do1 = load_rows(p_dout + i_b * stride_ob + i_h * D, stride_ol, i_rows, b_keep, D, D0, D1)
    b_lse, b_scored, b_dlse = position_gradients(p_saved, p_dscore, p_dout, p_mask, i_row, i_at, b_keep, B, L, H, MEAN)
    b_delta = tl.zeros([BLOCK], tl.float32)
    if p_dout is not None:
        for i_k in tl.range(0, T, T0, num_stages=STAGES):
            i_t = i_k + tl.arange(0, T0)
            b_a, _, b_k0, b_k1, b_v0, b_v1 = load_keys(
                p_km, p_vm, p_v, p_length, p_bias, p_mask, i_m, i_t, T, stride_kt, stride_vt, D, D0, D1
            )
            b_s, b_p, b_dp = tile_gradients(
                p_dout,
                p_dscore,
                p_mask,
                p_v,
                p_tokens,
                b_q0,
                b_q1,
                b_k0,
                b_k1,
                b_do0,
                b_do1,
                b_v0,
                b_v1,
                b_a,
                b_lse,
                factor,
                i_b,
                i_rows,
                b_keep,
                i_t,
                n,
                L,
                H,
                DTYPE,
                D1,
            )
            b_delta += tl.sum(b_p * b_dp, 1)
    if p_new_delta is not None:
        tl.store(p_new_delta + i_at, b_delta, mask=b_keep)
    if p_dq is not None:
        b_dq0 = tl.zeros([BLOCK, D0], tl.float32)
        b_dq1 = tl.zeros([BLOCK, D1 if D1 > 0 else 1], tl.float32)
        for i_k in tl.range(0, T, T0, num_stages=STAGES):
            i_t = i_k + tl.arange(0, T0)
            b_a, b_h, b_k0, b_k1, b_v0, b_v1 = load_keys(
                p_km, p_vm, p_v, p_length, p_bias, p_mask, i_m, i_t, T, stride_kt, stride_vt, D, D0, D1
            )
            b_s, b_p, b_dp = tile_gradients(
                p_dout,
                p_dscore,
                p_mask,
                p_v,
                p_tokens,
                b_q0,
                b_q1,
                b_k0,
                b_k1,
                b_do0,
                b_do1,
                b_v0,
                b_v1,
                b_a,
                b_lse,
                factor,
                i_b,
                i_rows,
                b_keep,
                i_t,
                n,
                L,
                H,
                DTYPE,
                D1,
            )
            b_ds = logit_gradient(p_dout, p_dscore, p_mask, b_s, b_p, b_dp, b_delta, b_h, b_scored, b_dlse).to(DTYPE)
            b_dq0 = tl.dot(b_ds, b_k0, b_dq0, input_precision="ieee")
            if D1 > 0:
                b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision="ieee")
        p_dqb = p_dq + (i_b * L * H + i_h) * D
        store_rows(p_dqb, tl.cast(H, tl.int64) * D, i_rows, b_keep, b_dq0 * size, b_dq1 * size, D, D0, D1)
