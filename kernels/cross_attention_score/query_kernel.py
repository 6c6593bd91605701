"""Cross-attention with its score, backward: the gradient of the queries, and what all gradients share.

    dS = P (dP − δ) + P_scored · dlse     dP[t] = dO·v[t]     δ = Σ_t P dP     dq = scale · dS k

Letters: B rows, M texts, H heads, D head width, L image positions, T text tokens. P is made again from q, k and the
saved log-sum-exp. Everything is float32 but the operands of products, which have q's type.

Maps of tokens are attention to values of 0 and 1: map n shows v[t, n] = 1 where t is token n. Their backward pass is
this one, with dP taken from the maps' gradients (``p_tokens`` instead of ``p_v``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from dsd_fast.kernels.common.kernel import (
    INF,
    LOG2E,
    SIZES,
    Text,
    add_rows,
    dot_rows,
    finite,
    load_keys,
    load_rows,
    logits,
    store_rows,
    text_of,
    zero_rows,
)

MAPS = tl.constexpr(16)
"""Maps whose gradients are taken at once."""


class Row(NamedTuple):
    """One head of one row, with what a forward pass saved and the gradients of its results; None for what is absent."""

    p_dout: Any
    p_dscore: Any
    p_saved: Any
    p_tokens: Any
    i_b: Any
    i_h: Any
    B: Any
    L: Any
    H: Any
    n: Any
    stride_ob: Any
    stride_ol: Any


class Positions(NamedTuple):
    """A block of a row's positions, those to ``keep`` existing: the others have P = 0.

    ``q`` and ``dout`` are in parts; ``lse`` of all keys and ``scored`` of those that the score counts are in units of
    log 2. What is absent has another in its place.
    """

    i_l: Any
    keep: Any
    q: Any
    dout: Any
    lse: Any
    scored: Any
    dlse: Any


class Tile(NamedTuple):
    """A tile (positions, keys): S in units of log 2, P and dP; dP is P where there is no dO."""

    s: Any
    p: Any
    dp: Any


@triton.jit
def load_positions(row, text, i_row, i_l, i_at, b_keep, b_q, MEAN: tl.constexpr, D: tl.constexpr):
    """Positions i_l, which are i_at in (B, H, L), and their queries b_q, with all else that is known of them."""
    b_dout = b_q
    if text.p_v is not None:
        b_dout = load_rows(row.p_dout + row.i_b * row.stride_ob + row.i_h * D, row.stride_ol, i_l, b_keep, D)
    b_lse = finite(tl.load(row.p_saved + i_at, mask=b_keep, other=INF)) * LOG2E
    b_scored = b_lse
    b_dlse = b_lse
    if row.p_dscore is not None:
        if text.p_mask is not None:
            p_scored = row.p_saved + tl.cast(row.B, tl.int64) * row.H * row.L + i_at
            b_scored = finite(tl.load(p_scored, mask=b_keep, other=INF)) * LOG2E
        if MEAN:
            b_dlse = tl.where(b_keep, tl.load(row.p_dscore + i_row), 0.0)
            if row.p_dout is not None:
                b_dlse = b_dlse / row.L
        else:
            b_dlse = tl.load(row.p_dscore + i_at, mask=b_keep, other=0.0)
    return Positions(i_l, b_keep, b_q, b_dout, b_lse, b_scored, b_dlse)


@triton.jit
def tile_gradients(row, text, at, keys, factor):
    """The tile of positions and keys."""
    b_s = logits(at.q, keys.k, keys.bias, factor)
    b_p = tl.exp2(b_s - at.lse[:, None])
    b_dp = b_p
    if row.p_dout is not None:
        b_dp = dot_rows(at.dout, keys.v) if text.p_v is not None else map_gradient(row, at, keys.i_t, b_p * 0.0)
    return Tile(b_s, b_p, b_dp)


@triton.jit
def map_gradient(row, at, i_t, b_dp):
    """dP of a tile (positions, keys): the gradients of the maps that show a key, over H. b_dp is 0."""
    DTYPE: tl.constexpr = at.q[0].dtype
    for i_n in range(0, row.n, MAPS):
        i_map = i_n + tl.arange(0, MAPS)
        b_token = tl.load(row.p_tokens + row.i_b * row.n + i_map, mask=i_map < row.n, other=-1)
        b_shown = (b_token[:, None] == i_t[None, :]).to(DTYPE)
        p_map = row.p_dout + (row.i_b * row.n + i_map)[None, :] * tl.cast(row.L, tl.int64) + at.i_l[:, None]
        b_dmap = tl.load(p_map, mask=(i_map < row.n)[None, :] & at.keep[:, None], other=0.0)
        b_dp = tl.dot(b_dmap.to(DTYPE), b_shown, b_dp, input_precision="ieee")
    return b_dp / row.H


@triton.jit
def logit_gradient(row, text, at, keys, tile, b_delta):
    """dS of a tile (positions, keys)."""
    b_ds = tile.p
    if row.p_dscore is None:
        b_ds = tile.p * (tile.dp - b_delta[:, None])
    elif text.p_mask is not None:
        b_ds = tl.exp2(tile.s + keys.hidden[None, :] - at.scored[:, None]) * at.dlse[:, None]
        if row.p_dout is not None:
            b_ds += tile.p * (tile.dp - b_delta[:, None])
    elif row.p_dout is not None:
        b_ds = tile.p * (tile.dp + (at.dlse - b_delta)[:, None])
    else:
        b_ds = tile.p * at.dlse[:, None]
    return b_ds


@triton.jit
def gradient_scale(p_dout, scale, L, MEAN: tl.constexpr):
    """The factor of the sums of dS: 1 / L of a mean alone comes last, so that 16-bit products do not underflow."""
    size = tl.cast(scale, tl.float32)
    if MEAN and p_dout is None:
        size = size / L
    return size


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
    i_t0 = tl.arange(0, T0)
    p_km = p_k + i_m * stride_km + i_h * D
    p_vm = None if p_v is None else p_v + i_m * stride_vm + i_h * D
    text = Text(p_km, p_vm, p_length, p_bias, p_mask, i_m, T, stride_kt, stride_vt)
    tiles = [load_keys(text, i_t0, D)]
    if T1 > 0:
        # Joined with +, tuples of named tuples would lose the names.
        tiles = [tiles[0], load_keys(text, T0 + tl.arange(0, T1), D)]
    row = Row(p_dout, p_dscore, p_saved, p_tokens, i_b, i_h, B, L, H, n, stride_ob, stride_ol)
    p_qb = p_q + i_b * stride_qb + i_h * D

    for i_l in tl.range(i_s * span, tl.minimum(L, (i_s + 1) * span), BLOCK, num_stages=STAGES):
        i_rows = i_l + tl.arange(0, BLOCK)
        b_keep = i_rows < L
        i_at = i_row * L + i_rows
        b_q = load_rows(p_qb, stride_ql, i_rows, b_keep, D)
        at = load_positions(row, text, i_row, i_rows, i_at, b_keep, b_q, MEAN, D)
        grads = [tile_gradients(row, text, at, tiles[0], factor)]
        b_delta = tl.sum(grads[0].p * grads[0].dp, 1)
        if T1 > 0:
            grads = [grads[0], tile_gradients(row, text, at, tiles[1], factor)]
            b_delta += tl.sum(grads[1].p * grads[1].dp, 1)
        if p_new_delta is not None:
            tl.store(p_new_delta + i_at, b_delta, mask=b_keep)
        if p_dq is not None:
            b_dq = zero_rows(BLOCK, D)
            for i in tl.static_range(len(tiles)):
                b_ds = logit_gradient(row, text, at, tiles[i], grads[i], b_delta)
                b_dq = add_rows(b_dq, b_ds.to(p_q.dtype.element_ty), tiles[i].k)
            p_dqb = p_dq + (i_b * L * H + i_h) * D
            store_rows(p_dqb, tl.cast(H, tl.int64) * D, i_rows, b_keep, [b_part * size for b_part in b_dq], D)


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
    i_rows = i_n * BLOCK + tl.arange(0, BLOCK)
    b_keep = i_rows < L
    i_at = i_row * L + i_rows
    b_q = load_rows(p_q + i_b * stride_qb + i_h * D, stride_ql, i_rows, b_keep, D)
    p_km = p_k + i_m * stride_km + i_h * D
    p_vm = None if p_v is None else p_v + i_m * stride_vm + i_h * D
    text = Text(p_km, p_vm, p_length, p_bias, p_mask, i_m, T, stride_kt, stride_vt)
    row = Row(p_dout, p_dscore, p_saved, p_tokens, i_b, i_h, B, L, H, n, stride_ob, stride_ol)
    at = load_positions(row, text, i_row, i_rows, i_at, b_keep, b_q, MEAN, D)
    b_delta = tl.zeros([BLOCK], tl.float32)
    if p_dout is not None:
        for i_k in tl.range(0, T, T0, num_stages=STAGES):
            keys = load_keys(text, i_k + tl.arange(0, T0), D)
            tile = tile_gradients(row, text, at, keys, factor)
            b_delta += tl.sum(tile.p * tile.dp, 1)
    if p_new_delta is not None:
        tl.store(p_new_delta + i_at, b_delta, mask=b_keep)
    if p_dq is not None:
        b_dq = zero_rows(BLOCK, D)
        for i_k in tl.range(0, T, T0, num_stages=STAGES):
            keys = load_keys(text, i_k + tl.arange(0, T0), D)
            tile = tile_gradients(row, text, at, keys, factor)
            b_ds = logit_gradient(row, text, at, keys, tile, b_delta)
            b_dq = add_rows(b_dq, b_ds.to(p_q.dtype.element_ty), keys.k)
        p_dqb = p_dq + (i_b * L * H + i_h) * D
        store_rows(p_dqb, tl.cast(H, tl.int64) * D, i_rows, b_keep, [b_part * size for b_part in b_dq], D)
