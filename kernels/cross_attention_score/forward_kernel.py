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
    Keys,
    Text,
    add_exp,
    add_rows,
    dot_rows,
    exp_rows,
    finite,
    hidden_keys,
    key_bias,
    load_keys,
    load_rows,
    logits,
    row_max,
    store_rows,
    text_of,
    zero_rows,
)


@triton.jit
def load_tile(p_k, p_v, text, i_h, i_t, stride_km, stride_vm, D: tl.constexpr):
    """As load_keys, with the keys and values of all texts and heads."""
    b_bias = key_bias(text.p_length, text.p_bias, text.i_m, i_t, text.T)
    p_km = p_k + text.i_m * stride_km + i_h * D
    b_k = load_rows(p_km, text.stride_kt, i_t, b_bias > -INF, D)
    b_v = b_k
    if p_v is not None:
        p_vm = p_v + text.i_m * stride_vm + i_h * D
        b_v = load_rows(p_vm, text.stride_vt, i_t, b_bias > -INF, D)
    b_hidden = b_bias
    if text.p_mask is not None:
        b_hidden = hidden_keys(text.p_mask, text.i_m, i_t, text.T)
    return Keys(i_t, b_bias, b_hidden, b_k, b_v)


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
    D: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """T ≤ T0 + T1: all keys in one tile of two parts. Program (span, row, head), heads fastest: they share cache lines.

    p_out (B, L, H·D) contiguous, or None with p_v; p_score (B, H, L) or None; p_saved (1 or 2, B, H, L) or None. The
    rest as in reference.forward, with text_index None for row b → text b.
    """
    i_p = tl.program_id(0)
    i_h, i_b, i_s = (i_p % H).to(tl.int64), (i_p // H % B).to(tl.int64), i_p // H // B
    i_m = text_of(p_index, i_b)
    i_row = i_b * H + i_h
    BIASED: tl.constexpr = (p_bias is not None) or (p_length is not None) or T0 == 16
    factor = tl.cast(scale, tl.float32) * LOG2E
    text = Text(None, None, p_length, p_bias, p_mask, i_m, T, stride_kt, stride_vt)
    tiles = [load_tile(p_k, p_v, text, i_h, tl.arange(0, T0), stride_km, stride_vm, D)]
    if T1 > 0:
        # Joined with +, tuples of named tuples would lose the names.
        tiles = [tiles[0], load_tile(p_k, p_v, text, i_h, T0 + tl.arange(0, T1), stride_km, stride_vm, D)]

    p_qb = p_q + i_b * stride_qb + i_h * D
    for i_l in tl.range(i_s * span, tl.minimum(L, (i_s + 1) * span), BLOCK, num_stages=STAGES):
        i_rows = i_l + tl.arange(0, BLOCK)
        b_keep = i_rows < L
        b_q = load_rows(p_qb, stride_ql, i_rows, b_keep, D)
        if BIASED:
            b_s = [logits(b_q, keys.k, keys.bias, factor) for keys in tiles]
            b_max = finite(row_max(b_s))
        else:
            # The factor is not negative: the maximum is taken first, and the product becomes part of exp2's argument.
            b_qk = dot_rows(b_q, tiles[0].k)
            b_max = tl.max(b_qk, 1) * factor
            b_s = [b_qk * factor]
            if T1 > 0:
                b_s += [logits(b_q, tiles[1].k, tiles[1].bias, factor)]
                b_max = tl.maximum(b_max, tl.max(b_s[1], 1))
        b_p, b_sum = exp_rows(b_s, b_max)
        b_lse = (b_max + tl.log2(b_sum)) * LN2

        if p_v is not None:
            b_o = []
            for i in tl.static_range(len(tiles[0].v)):
                b_part = tl.dot(b_p[0].to(p_v.dtype.element_ty), tiles[0].v[i], input_precision="ieee")
                if T1 > 0:
                    b_part = tl.dot(b_p[1].to(p_v.dtype.element_ty), tiles[1].v[i], b_part, input_precision="ieee")
                # A row without keys has sum 0 and products 0.
                b_norm = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
                b_o += [b_part * b_norm]
            p_ob = p_out + (i_b * L * H + i_h) * D
            store_rows(p_ob, H.to(tl.int64) * D, i_rows, b_keep, b_o, D)

        b_score = b_lse
        if p_mask is not None:
            # Its own maximum: the scored keys may all lie far below the others.
            b_scored = [b_s[0] + tiles[0].hidden[None, :]]
            if T1 > 0:
                b_scored += [b_s[1] + tiles[1].hidden[None, :]]
            b_max = finite(row_max(b_scored))
            _, b_sum = exp_rows(b_scored, b_max)
            b_score = (b_max + tl.log2(b_sum)) * LN2
        i_at = i_row * L + i_rows
        if p_saved is not None:
            tl.store(p_saved + i_at, b_lse, mask=b_keep)
            if p_mask is not None:
                tl.store(p_saved + B.to(tl.int64) * H * L + i_at, b_score, mask=b_keep)
        if p_score is not None:
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
    D: tl.constexpr,
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
    b_q = load_rows(p_q + i_b * stride_qb + i_h * D, stride_ql, i_rows, b_keep, D)
    p_km = p_k + i_m * stride_km + i_h * D
    p_vm = None if p_v is None else p_v + i_m * stride_vm + i_h * D
    text = Text(p_km, p_vm, p_length, p_bias, p_mask, i_m, T, stride_kt, stride_vt)
    b_max = tl.full([BLOCK], -INF, tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_max_scored, b_sum_scored = b_max, b_sum
    b_o = zero_rows(BLOCK, D)

    for i_k in tl.range(0, T, T0, num_stages=STAGES):
        keys = load_keys(text, i_k + tl.arange(0, T0), D)
        b_s = logits(b_q, keys.k, keys.bias, factor)
        b_max, b_sum, b_p, b_decay = add_exp(b_max, b_sum, b_s)
        if p_v is not None:
            b_o = add_rows([b_part * b_decay[:, None] for b_part in b_o], b_p.to(p_v.dtype.element_ty), keys.v)
        if p_mask is not None:
            b_max_scored, b_sum_scored, _, _ = add_exp(b_max_scored, b_sum_scored, b_s + keys.hidden[None, :])

    b_lse = (finite(b_max) + tl.log2(b_sum)) * LN2
    if p_v is not None:
        b_norm = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
        p_ob = p_out + (i_b * L * H + i_h) * D
        store_rows(p_ob, H.to(tl.int64) * D, i_rows, b_keep, [b_part * b_norm for b_part in b_o], D)
    b_score = b_lse
    if p_mask is not None:
        b_score = (finite(b_max_scored) + tl.log2(b_sum_scored)) * LN2
    i_at = i_row * L + i_rows
    if p_saved is not None:
        tl.store(p_saved + i_at, b_lse, mask=b_keep)
        if p_mask is not None:
            tl.store(p_saved + B.to(tl.int64) * H * L + i_at, b_score, mask=b_keep)
    if p_score is not None:
        tl.store(p_score + i_at, b_score, mask=b_keep)


@triton.jit(do_not_specialize=["n"])
def mean_kernel(p_mean, p_x, n, BLOCK: tl.constexpr):
    """Means of the rows of (·, n) float32, always added in the same order."""
    i_row = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_n in range(0, n, BLOCK):
        i_at = i_n + tl.arange(0, BLOCK)
        b_sum += tl.load(p_x + i_row * n + i_at, mask=i_at < n, other=0.0)
    tl.store(p_mean + i_row, tl.sum(b_sum, 0) / n)
