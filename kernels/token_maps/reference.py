"""Attention probabilities of chosen tokens, averaged over heads, in plain torch: the oracle of every other form.

Letters: B rows, M texts, H heads, D head width, L image positions, T text tokens, n maps. Arithmetic is float32
whatever the inputs' type (float64 stays float64), in chunks, so that no tensor of size H·L·T ever exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsd_fast.kernels.common.attention import (
    add_by_text,
    attention_logits,
    chunks,
    join_heads,
    probabilities,
    real_dtype,
    split_heads,
    text_bias,
    without_masked,
)


def forward(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    text_index: Tensor,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    heads: int,
    scale: float,
) -> Tensor:
    """(B, n, L): mean over heads of softmax(q kᵀ·scale + key_bias) at the keys ``tokens`` (B, n) of each row's text.

    Args:
        q: (B, L, H·D); k: (M, T, H·D); tokens: (B, n) int64; the rest as in cross_attention_score.
    """
    rows, length, _ = q.shape
    real = real_dtype(q)
    maps = q.new_empty((rows, tokens.shape[1], length), dtype=real)
    for b, span in chunks(q.device, rows, length, heads, k.shape[1]):
        texts = text_index[b]
        bias = text_bias(k.shape[1], text_length, key_bias, texts, real)
        logits = attention_logits(q[b, span], without_masked(k[texts], bias), bias, heads, scale)
        chosen = tokens[b][:, None, None, :].expand(-1, heads, logits.shape[2], -1)
        p = probabilities(logits.gather(-1, chosen), torch.logsumexp(logits, dim=-1))
        maps[b, :, span] = p.mean(1).transpose(1, 2)
    return maps


def backward(
    dmaps: Tensor,
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    text_index: Tensor,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and key_bias, the last two summed over the rows that share a text.

    dP[l, t] = Σ dmaps[i, l] / H over the maps i that show token t; then as in cross_attention_score.

    Args:
        dmaps: (B, n, L); the rest as in :func:`forward`.

    Returns:
        dq (B, L, H·D), dk (M, T, H·D), dkey_bias (M, T); all contiguous.
    """
    rows, length, _ = q.shape
    real = real_dtype(q)
    dq, dk = (x.new_zeros(x.shape, dtype=real) for x in (q, k))
    dbias = k.new_zeros(k.shape[:2], dtype=real)
    shown = (tokens[..., None] == torch.arange(k.shape[1], device=k.device)).to(real) / heads
    for b, span in chunks(q.device, rows, length, heads, k.shape[1]):
        texts = text_index[b]
        bias = text_bias(k.shape[1], text_length, key_bias, texts, real)
        key = without_masked(k[texts], bias)
        logits = attention_logits(q[b, span], key, bias, heads, scale)
        p = probabilities(logits, torch.logsumexp(logits, dim=-1))
        dp = (dmaps[b, :, span].to(real).transpose(1, 2) @ shown[b])[:, None]
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dq[b, span] = join_heads(ds @ split_heads(key, heads).to(real)) * scale
        queries = split_heads(q[b, span], heads).to(real)
        add_by_text(dk, texts, join_heads(ds.transpose(-1, -2) @ queries) * scale)
        add_by_text(dbias, texts, ds.sum((1, 2)))
    return dq.to(q.dtype), dk.to(k.dtype), dbias
