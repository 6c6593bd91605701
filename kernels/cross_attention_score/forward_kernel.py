"""Cross-attention with its score, forward.

    S[l,t] = scale · q[l]·k[t] + key_bias[t]     lse = log Σ_t exp S     O[l] = Σ_t exp(S − lse) v[t]

Letters: B rows, M texts, H heads, D head width, L image positions, T text tokens. A program holds the keys and values
of one head of one text and streams blocks of that head's queries past them: with T ≤ 128 all keys are one tile, so
the softmax is exact in one pass, and only the inputs and the results touch memory. Logits, exponentials (base 2),
sums and scores are float32; the probabilities are rounded to the type of v for their product with it, and 32-bit
products are IEEE's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsd_fast.kernels.common.kernel import (
    INF,
    LN2,
    LOG2E,
    SIZES,
    dot_rows,
    finite,
    hidden_keys,
    key_bias,
    load_rows,
    store_rows,
    store_sum,
    text_of,
)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_out,
    p_score,
    p_saved,
    p_q,
    p_k,
    p_v,
    p_index,
    p_length,
    p_bias,
    p_mask,
    B,
    L,
    T,
    H,
    span,
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
    """T ≤ T0 + T1: all keys in one tile of two parts. Program (span, row, head), heads fastest: they share cache lines.

    p_out (B, L, H·D) contiguous, or None with p_v; p_score (B, H, L), or with MEAN (B, H, blocks) of sums / L;
    p_saved (1 or 2, B, H, L) or None. The rest as in reference.forward, with text_index None for row b → text b.
    """
    i_p = tl.program_id(0)
    i_h, i_b, i_s = (i_p % H).to(tl.int64), (i_p // H % B).to(tl.int64), i_p // H // B
    i_m = text_of(p_index, i_b)
    i_row = i_b * H + i_h
    BIASED: tl.constexpr = (p_bias is not None) or (p_length is not None) or T0 == 16
    factor = tl.cast(scale, tl.float32) * LOG2E

    i_t0 = tl.arange(0, T0)
    b_a0 = key_bias(p_length, p_bias, i_m, i_t0, T)
    p_km = p_k + i_m * stride_km + i_h * D
    b_k00, b_k01 = load_rows(p_km, stride_kt, i_t0, b_a0 > -INF, D, D0, D1)
    if p_v is not None:
        p_vm = p_v + i_m * stride_vm + i_h * D
        b_v00, b_v01 = load_rows(p_vm, stride_vt, i_t0, b_a0 > -INF, D, D0, D1)
    if p_mask is not None:
        b_h0 = hidden_keys(p_mask, i_m, i_t0, T)
    if T1 > 0:
        i_t1 = T0 + tl.arange(0, T1)
        b_a1 = key_bias(p_length, p_bias, i_m, i_t1, T)
        b_k10, b_k11 = load_rows(p_km, stride_kt, i_t1, b_a1 > -INF, D, D0, D1)
        if p_v is not None:
            b_v10, b_v11 = load_rows(p_vm, stride_vt, i_t1, b_a1 > -INF, D, D0, D1)
        if p_mask is not None:
            b_h1 = hidden_keys(p_mask, i_m, i_t1, T)

    p_qb = p_q + i_b * stride_qb + i_h * D
    for i_l in tl.range(i_s * span, tl.minimum(L, (i_s + 1) * span), BLOCK, num_stages=STAGES):
        i_rows = i_l + tl.arange(0, BLOCK)
        b_keep = i_rows < L
        b_q0, b_q1 = load_rows(p_qb, stride_ql, i_rows, b_keep, D, D0, D1)
        b_s0 = dot_rows(b_q0, b_q1, b_k00, b_k01, D1)
        if BIASED:
            b_s0 = b_s0 * factor + b_a0[None, :]
            b_max = tl.max(b_s0, 1)
        else:
            # The factor is not negative: the maximum is taken first, and the product becomes part of exp2's argument.
            b_max = tl.max(b_s0, 1) * factor
            b_s0 = b_s0 * factor
        if T1 > 0:
            b_s1 = dot_rows(b_q0, b_q1, b_k10, b_k11, D1) * factor + b_a1[None, :]
            b_max = tl.maximum(b_max, tl.max(b_s1, 1))
        if BIASED:
            b_max = finite(b_max)
        b_p0 = tl.exp2(b_s0 - b_max[:, None])
        b_sum = tl.sum(b_p0, 1)
        if T1 > 0:
            b_p1 = tl.exp2(b_s1 - b_max[:, None])
            b_sum += tl.sum(b_p1, 1)
        b_lse = (b_max + tl.log2(b_sum)) * LN2

        if p_v is not None:
            b_o0 = tl.dot(b_p0.to(p_v.dtype.element_ty), b_v00, input_precision="ieee")
            if T1 > 0:
                b_o0 = tl.dot(b_p1.to(p_v.dtype.element_ty), b_v10, b_o0, input_precision="ieee")
            # A row without keys has sum 0 and products 0.
            b_norm = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
            b_o0 = b_o0 * b_norm
            b_o1 = b_o0
            if D1 > 0:
                b_o1 = tl.dot(b_p0.to(p_v.dtype.element_ty), b_v01, input_precision="ieee")
                if T1 > 0:
                    b_o1 = tl.dot(b_p1.to(p_v.dtype.element_ty), b_v11, b_o1, input_precision="ieee")
                b_o1 = b_o1 * b_norm
            p_ob = p_out + (i_b * L * H + i_h) * D
            store_rows(p_ob, H.to(tl.int64) * D, i_rows, b_keep, b_o0, b_o1, D, D0, D1)

        b_score = b_lse
        if p_mask is not None:
            # Its own maximum: the scored keys may all lie far below the others.
            b_s0 += b_h0[None, :]
            b_max = tl.max(b_s0, 1)
            if T1 > 0:
                b_s1 += b_h1[None, :]
                b_max = tl.maximum(b_max, tl.max(b_s1, 1))
            b_max = finite(b_max)
            b_sum = tl.sum(tl.exp2(b_s0 - b_max[:, None]), 1)
            if T1 > 0:
                b_sum += tl.sum(tl.exp2(b_s1 - b_max[:, None]), 1)
            b_score = (b_max + tl.log2(b_sum)) * LN2
        i_at = i_row * L + i_rows
        if p_saved is not None:
            tl.store(p_saved + i_at, b_lse, mask=b_keep)
            if p_mask is not None:
                tl.store(p_saved + B.to(tl.int64) * H * L + i_at, b_score, mask=b_keep)
        if MEAN:
            blocks = tl.cdiv(L, BLOCK)
            store_sum(p_score + i_row * blocks + i_l // BLOCK, b_score / L, b_keep, BLOCK)
        else:
            tl.store(p_score + i_at, b_score, mask=b_keep)


@triton.jit(do_not_specialize=SIZES)
def forward_loop_kernel(
    p_out,
    p_score,
    p_saved,
    p_q,
    p_k,
    p_v,
    p_index,
    p_length,
    p_bias,
    p_mask,
    B,
    L,
    T,
    H,
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
    """Any T: a program holds a block of queries and streams tiles of T0 keys, with a running maximum and sum.

    Program (block, row, head); pointers as in forward_kernel.
    """
    i_p = tl.program_id(0)
    i_h, i_b, i_n = (i_p % H).to(tl.int64), (i_p // H % B).to(tl.int64), i_p // H // B
    i_m = text_of(p_index, i_b)
    i_row = i_b * H + i_h
    factor = tl.cast(scale, tl.float32) * LOG2E
    i_rows = i_n * BLOCK + tl.arange(0, BLOCK)
    b_keep = i_rows < L
    b_q0, b_q1 = load_rows(p_q + i_b * stride_qb + i_h * D, stride_ql, i_rows, b_keep, D, D0, D1)
    p_km = p_k + i_m * stride_km + i_h * D
    b_max = tl.full([BLOCK], -INF, tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    if p_mask is not None:
        b_max_scored = tl.full([BLOCK], -INF, tl.float32)
        b_sum_scored = tl.zeros([BLOCK], tl.float32)
    if p_v is not None:
        p_vm = p_v + i_m * stride_vm + i_h * D
        b_o0 = tl.zeros([BLOCK, D0], tl.float32)
        b_o1 = tl.zeros([BLOCK, D1 if D1 > 0 else D0], tl.float32)

    for i_k in tl.range(0, T, T0, num_stages=STAGES):
        i_t = i_k + tl.arange(0, T0)
        b_a = key_bias(p_length, p_bias, i_m, i_t, T)
        b_k0, b_k1 = load_rows(p_km, stride_kt, i_t, b_a > -INF, D, D0, D1)
        b_s = dot_rows(b_q0, b_q1, b_k0, b_k1, D1) * factor + b_a[None, :]
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_safe = finite(b_new)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_decay = tl.exp2(b_max - b_safe)
        b_max = b_new
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        if p_v is not None:
            b_v0, b_v1 = load_rows(p_vm, stride_vt, i_t, b_a > -INF, D, D0, D1)
            b_p = b_p.to(p_v.dtype.element_ty)
            b_o0 = tl.dot(b_p, b_v0, b_o0 * b_decay[:, None], input_precision="ieee")
            if D1 > 0:
                b_o1 = tl.dot(b_p, b_v1, b_o1 * b_decay[:, None], input_precision="ieee")
        if p_mask is not None:
            b_s += hidden_keys(p_mask, i_m, i_t, T)[None, :]
            b_new = tl.maximum(b_max_scored, tl.max(b_s, 1))
            b_safe = finite(b_new)
            b_sum_scored = b_sum_scored * tl.exp2(b_max_scored - b_safe) + tl.sum(tl.exp2(b_s - b_safe[:, None]), 1)
            b_max_scored = b_new

    b_lse = (finite(b_max) + tl.log2(b_sum)) * LN2
    if p_v is not None:
        b_norm = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
        p_ob = p_out + (i_b * L * H + i_h) * D
        store_rows(p_ob, H.to(tl.int64) * D, i_rows, b_keep, b_o0 * b_norm, b_o1 * b_norm, D, D0, D1)
    b_score = b_lse
    if p_mask is not None:
        b_score = (finite(b_max_scored) + tl.log2(b_sum_scored)) * LN2
    i_at = i_row * L + i_rows
    if p_saved is not None:
        tl.store(p_saved + i_at, b_lse, mask=b_keep)
        if p_mask is not None:
            tl.store(p_saved + B.to(tl.int64) * H * L + i_at, b_score, mask=b_keep)
    if MEAN:
        store_sum(p_score + i_row * tl.cdiv(L, BLOCK) + i_n, b_score / L, b_keep, BLOCK)
    else:
        tl.store(p_score + i_at, b_score, mask=b_keep)


@triton.jit(do_not_specialize=["n"])
def sum_kernel(p_sum, p_x, n, BLOCK: tl.constexpr):
    """Sums of the rows of (·, n) float32, always in the same order."""
    i_row = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_n in range(0, n, BLOCK):
        i_at = i_n + tl.arange(0, BLOCK)
        b_sum += tl.load(p_x + i_row * n + i_at, mask=i_at < n, other=0.0)
    tl.store(p_sum + i_row, tl.sum(b_sum, 0))
