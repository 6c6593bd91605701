"""Cross-attention with its score, backward: the gradients of keys, values and bias, summed over the rows of a text.

    dk = scale · Σ dS q     dv = Σ P dO     dkey_bias = Σ dS          dS as in query_kernel.py

Letters: B rows, M texts, H heads, D head width, L image positions, T text tokens. Blocks of queries stream past a tile
of keys into a part of the sums for each row and span of positions. A second kernel adds the parts of each text in the
order of its rows: no atomics, so equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsd_fast.kernels.common.kernel import (
    LOG2E,
    SIZES,
    Text,
    add_rows,
    load_keys,
    load_rows,
    store_rows,
    text_of,
    zero_rows,
)
from dsd_fast.kernels.cross_attention_score.query_kernel import (
    Row,
    gradient_scale,
    load_positions,
    logit_gradient,
    tile_gradients,
)


@triton.jit
def text_tile(
    outputs,
    queries,
    p_delta,
    row,
    text,
    i_s,
    i_t,
    span,
    scale,
    MEAN: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What text_kernel does for the keys i_t, of which outputs are p_dk, p_dv and p_dbias, queries p_q and strides."""
    p_dk, p_dv, p_dbias = outputs
    p_q, stride_qb, stride_ql = queries
    i_b, i_h, L, T, H = row.i_b, row.i_h, row.L, text.T, row.H
    i_row = i_b * H + i_h
    factor = tl.cast(scale, tl.float32) * LOG2E
    keys = load_keys(text, i_t, D)
    b_dk = zero_rows(i_t.shape[0], D)
    b_dv = b_dk
    b_db = tl.zeros([i_t.shape[0]], tl.float32)

    for i_l in tl.range(i_s * span, tl.minimum(L, (i_s + 1) * span), BLOCK, num_stages=STAGES):
        i_rows = i_l + tl.arange(0, BLOCK)
        b_keep = i_rows < L
        i_at = i_row * L + i_rows
        b_q = load_rows(p_q + i_b * stride_qb + i_h * D, stride_ql, i_rows, b_keep, D)
        at = load_positions(row, text, i_row, i_rows, i_at, b_keep, b_q, MEAN, D)
        tile = tile_gradients(row, text, at, keys, factor)
        if p_dk is not None:
            b_delta = at.lse
            if p_delta is not None:
                b_delta = tl.load(p_delta + i_at, mask=b_keep, other=0.0)
            b_ds = logit_gradient(row, text, at, keys, tile, b_delta)
            if p_dbias is not None:
                b_db += tl.sum(b_ds, 0)
            b_dk = add_rows(b_dk, tl.trans(b_ds.to(at.q[0].dtype)), at.q)
        if p_dv is not None:
            b_dv = add_rows(b_dv, tl.trans(tile.p.to(at.q[0].dtype)), at.dout)

    i_part = i_b * tl.cdiv(L, span) + i_s
    stride_h = tl.cast(H, tl.int64) * D
    i_text = i_part * T * stride_h + i_h * D
    if p_dk is not None:
        size = gradient_scale(row.p_dout, scale, L, MEAN)
        store_rows(p_dk + i_text, stride_h, i_t, i_t < T, [b_part * size for b_part in b_dk], D)
    if p_dv is not None:
        store_rows(p_dv + i_text, stride_h, i_t, i_t < T, b_dv, D)
    if p_dbias is not None:
        weight = gradient_scale(row.p_dout, 1.0, L, MEAN)
        tl.store(p_dbias + (i_part * H + i_h) * T + i_t, b_db * weight, mask=i_t < T)


@triton.jit(do_not_specialize=[*SIZES, "n"])
def text_kernel(
    p_dk,
    p_dv,
    p_dbias,
    p_dout,
    p_dscore,
    p_delta,
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
    T0: tl.constexpr,
    T1: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dk, dv and dkey_bias of a tile of keys over a span of positions: tiles of T0 keys, the rest in one of T1.

    Program (span, row, head, tile), tiles fastest: they share queries. p_dk, p_dv (B, spans, T, H·D) or None; p_dbias
    (B, spans, H, T) or None, without p_dk None; p_delta (B, H, L), there with p_dout. The rest as in query_kernel.
    """
    tiles = T // T0 + (1 if T1 > 0 else 0)
    i_p = tl.program_id(0)
    i_k, i_p = i_p % tiles, i_p // tiles
    i_h, i_b, i_s = (i_p % H).to(tl.int64), (i_p // H % B).to(tl.int64), i_p // H // B
    i_m = text_of(p_index, i_b)
    p_km = p_k + i_m * stride_km + i_h * D
    p_vm = None if p_v is None else p_v + i_m * stride_vm + i_h * D
    text = Text(p_km, p_vm, p_length, p_bias, p_mask, i_m, T, stride_kt, stride_vt)
    row = Row(p_dout, p_dscore, p_saved, p_tokens, i_b, i_h, B, L, H, n, stride_ob, stride_ol)
    outputs = (p_dk, p_dv, p_dbias)
    queries = (p_q, stride_qb, stride_ql)
    if i_k < T // T0:
        i_t = i_k * T0 + tl.arange(0, T0)
        text_tile(outputs, queries, p_delta, row, text, i_s, i_t, span, scale, MEAN, D, BLOCK, STAGES)
    if T1 > 0:  # noqa: SIM102 - a constant: without a rest there is nothing to compile
        if i_k == T // T0:
            i_t = i_k * T0 + tl.arange(0, T1)
            text_tile(outputs, queries, p_delta, row, text, i_s, i_t, span, scale, MEAN, D, BLOCK, STAGES)


@triton.jit(do_not_specialize=["parts", "N"])
def segment_sum_kernel(p_sum, p_part, p_order, p_start, parts, N, BLOCK: tl.constexpr):
    """Sums (M, N) of the parts (B, parts, N) of each text's rows, in their order.

    Program (block, text), blocks fastest.
    p_order (B,): the rows, those of a text side by side; p_start (M + 1,): where those of each text begin. Both None
    where row m is the only one of text m.
    """
    blocks = tl.cdiv(N, BLOCK)
    i_p = tl.program_id(0)
    i_m, i_n = (i_p // blocks).to(tl.int64), i_p % blocks * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    if p_order is not None:
        for i_at in range(tl.load(p_start + i_m), tl.load(p_start + i_m + 1)):
            i_b = tl.load(p_order + i_at)
            for i_s in range(parts):
                b_sum += tl.load(p_part + (i_b * parts + i_s) * N + i_n, mask=i_n < N, other=0.0)
    else:
        for i_s in range(parts):
            b_sum += tl.load(p_part + (i_m * parts + i_s) * N + i_n, mask=i_n < N, other=0.0)
    tl.store(p_sum + i_m * N + i_n, b_sum.to(p_sum.dtype.element_ty), mask=i_n < N)
