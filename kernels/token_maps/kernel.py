"""Attention maps of chosen tokens in Triton.

    maps[b,i,l] = 1/H Σ_h exp(S[b,h,l,t] − lse[b,h,l])   t = tokens[b,i], S and lse as in cross_attention_score

Letters: B rows, M texts, H heads, D head width, L image positions, T text tokens, n maps. A program holds a block of
positions and 16 maps of a row and goes through its heads: the log-sum-exp from tiles of all keys, the maps' own logits
from a product with their keys alone. Everything is float32 but the operands of products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsd_fast.kernels.common.build import Build
from dsd_fast.kernels.common.kernel import (
    INF,
    LOG2E,
    SIZES,
    WIDTHS,
    Launch,
    add_exp,
    build,
    finite,
    inputs,
    key_bias,
    load_rows,
    logits,
    on,
    options,
    text_of,
)
from dsd_fast.kernels.cross_attention_score import kernel as attention

MAPS = 16
"""Maps of a program: the fewest columns that a matrix unit takes."""

TILE = 16
"""Keys of a tile: 77 keys are 80."""

LAUNCH = Launch(block=64, warps=4, stages=2)


@triton.jit(do_not_specialize=[*SIZES, "n"])
def maps_kernel(
    p_maps,
    p_q,
    p_k,
    p_tokens,
    p_index,
    p_length,
    p_bias,
    B,
    L,
    T,
    H,
    n,
    stride_qb,
    stride_ql,
    stride_km,
    stride_kt,
    scale,
    D: tl.constexpr,
    T0: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (positions, maps, row), blocks of positions fastest. p_maps (B, n, L) float32, p_tokens (B, n) int64."""
    blocks = tl.cdiv(L, BLOCK)
    i_p = tl.program_id(0)
    i_l, i_c, i_b = i_p % blocks, i_p // blocks % tl.cdiv(n, N), (i_p // blocks // tl.cdiv(n, N)).to(tl.int64)
    i_m = text_of(p_index, i_b)
    factor = tl.cast(scale, tl.float32) * LOG2E
    i_rows = i_l * BLOCK + tl.arange(0, BLOCK)
    b_keep = i_rows < L
    i_map = i_c * N + tl.arange(0, N)
    b_token = tl.load(p_tokens + i_b * n + i_map, mask=i_map < n, other=T)
    b_chosen_bias = key_bias(p_length, p_bias, i_m, b_token, T)
    b_maps = tl.zeros([BLOCK, N], tl.float32)
    for i_head in range(H):
        i_h = tl.cast(i_head, tl.int64)
        p_head = p_q + i_b * stride_qb + i_h * D
        p_km = p_k + i_m * stride_km + i_h * D
        b_q = load_rows(p_head, stride_ql, i_rows, b_keep, D)
        b_max = tl.full([BLOCK], -INF, tl.float32)
        b_sum = tl.zeros([BLOCK], tl.float32)
        for i_k in tl.range(0, T, T0, num_stages=STAGES):
            i_t = i_k + tl.arange(0, T0)
            b_bias = key_bias(p_length, p_bias, i_m, i_t, T)
            b_k = load_rows(p_km, stride_kt, i_t, b_bias > -INF, D)
            b_max, b_sum, _, _ = add_exp(b_max, b_sum, logits(b_q, b_k, b_bias, factor))
        b_lse = finite(finite(b_max) + tl.log2(b_sum))
        b_chosen = load_rows(p_km, stride_kt, b_token, b_chosen_bias > -INF, D)
        b_s = logits(b_q, b_chosen, b_chosen_bias, factor)
        b_maps += tl.exp2(b_s - b_lse[:, None])
    p_row = p_maps + (i_b * n + i_map)[None, :] * L + i_rows[:, None]
    tl.store(p_row, b_maps / H, mask=(i_map < n)[None, :] & b_keep[:, None])


def forward(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    text_index: Tensor | None,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    heads: int,
    scale: float,
) -> Tensor:
    """As reference.forward; ``text_index`` None: row b has text b. Float32, float16 and bfloat16, D from 1 to 256."""
    rows, length, _ = q.shape
    count = tokens.shape[1]
    maps = q.new_empty((rows, count, length), dtype=torch.float32)
    if maps.numel() == 0:
        return maps
    grid = (triton.cdiv(length, LAUNCH.block) * triton.cdiv(count, MAPS) * rows,)
    with on(q.device):
        maps_kernel[grid](
            p_maps=maps,
            p_tokens=tokens.contiguous(),
            n=count,
            T0=TILE,
            N=MAPS,
            **inputs(q, k, text_index, text_length, key_bias, heads, scale),
            **options(LAUNCH, q.device),
        )
    return maps


def backward(
    dmaps: Tensor,
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    text_index: Tensor | None,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    heads: int,
    scale: float,
    *,
    query: bool = True,
    text: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As reference.backward; None instead of what is not asked for. The log-sum-exp is made again."""
    arguments = (text_index, text_length, key_bias, None)
    saved = attention.forward(q, k, None, *arguments, heads, scale, mean=False, save=False)[1]
    dq, dk, _, dbias = attention.backward(
        dmaps,
        None,
        q,
        k,
        None,
        *arguments,
        saved,
        heads,
        scale,
        False,
        tokens=tokens.contiguous(),
        query=query,
        text=text,
    )
    return dq, dk, dbias


def builds() -> list[Build]:
    """What maps of a few of 77 tokens compile, at the widths of SD 1.5, 2.x and SDXL, in both 16-bit types."""
    absent = {"p_length", "p_bias"}
    return [
        build(f"maps, D {width}, {dtype}", maps_kernel, dtype, LAUNCH, absent, width=width, tokens=77, T0=TILE, N=MAPS)
        for width in WIDTHS
        for dtype in ("bf16", "fp16")
    ]
