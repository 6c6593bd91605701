"""Cross-attention with its score in plain torch: the oracle of every other implementation, and the CPU form.

Letters: B rows, M texts, H heads, D head width, L image positions, T text tokens. Arithmetic is float32 whatever
the inputs' type (float64 stays float64). Rows and positions are worked through in chunks, so that no tensor of size
H·L·T ever exists.
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
    v: Tensor | None,
    text_index: Tensor,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    score_mask: Tensor | None,
    heads: int,
    scale: float,
    mean: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, score and what the backward pass needs.

    Args:
        q: (B, L, H·D).
        k, v: (M, T, H·D); ``v=None`` leaves the output out.
        text_index: (B,) int64, the text of each row.
        text_length: (M,) int64; keys at or beyond it are not read.
        key_bias: (M, T) float32, added to the logits.
        score_mask: (M, T) bool, the keys that the score counts; the output attends to all.
        mean: the score is the mean over positions, (B, H), instead of (B, H, L).
        save: also return the log-sum-exps for :func:`backward`.

    Returns:
        output (B, L, H·D) in q's type, or (0,) without ``v``;
        score (B, H, L) or (B, H), float32 or float64;
        saved (R, B, H, L): R = 0 unless ``save``; 1 without a ``score_mask``; 2 (all keys, scored keys) with one.
    """
    rows, length, _ = q.shape
    real = real_dtype(q)
    out = q.new_empty(q.shape) if v is not None else q.new_empty(0)
    score = q.new_zeros((rows, heads) if mean else (rows, heads, length), dtype=real)
    saved = q.new_empty(((1 if score_mask is None else 2) if save else 0, rows, heads, length), dtype=real)
    for b, span in chunks(q.device, rows, length, heads, k.shape[1]):
        texts = text_index[b]
        bias = text_bias(k.shape[1], text_length, key_bias, texts, real)
        logits = attention_logits(q[b, span], without_masked(k[texts], bias), bias, heads, scale)
        lse = torch.logsumexp(logits, dim=-1)
        scored = lse
        if score_mask is not None:
            hidden = ~score_mask[texts][:, None, None, :]
            scored = torch.logsumexp(logits.masked_fill(hidden, float("-inf")), dim=-1)
        if v is not None:
            p = probabilities(logits, lse)
            values = split_heads(without_masked(v[texts], bias), heads).to(real)
            out[b, span] = join_heads(p @ values).to(q.dtype)
        if mean:
            score[b] += scored.sum(-1) / length
        else:
            score[b, :, span] = scored
        if save:
            saved[0, b, :, span] = lse
        if save and score_mask is not None:
            saved[1, b, :, span] = scored
    return out, score, saved


def backward(
    dout: Tensor | None,
    dscore: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    text_index: Tensor,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    score_mask: Tensor | None,
    saved: Tensor,
    heads: int,
    scale: float,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and key_bias, the last three summed over the rows that share a text.

    dS = P∘(dP − δ) + P_scored·dscore with δ = Σ_t P∘dP; dq = scale·dS k, dk = scale·dSᵀ q, dv = Pᵀ dO,
    dkey_bias = Σ over heads and positions of dS. Texts that no row uses get zeros. The sums run in a fixed order, so
    equal inputs give equal bits.

    Args:
        dout: (B, L, H·D) or None; dscore: (B, H, L) or (B, H) or None; the rest as in :func:`forward`.

    Returns:
        dq (B, L, H·D), dk (M, T, H·D), dv (M, T, H·D) or (0,) without ``v``, dkey_bias (M, T); all contiguous.
    """
    rows, length, _ = q.shape
    real = real_dtype(q)
    dq, dk = (x.new_zeros(x.shape, dtype=real) for x in (q, k))
    dv = q.new_zeros(v.shape if v is not None else (0,), dtype=real)
    dbias = k.new_zeros(k.shape[:2], dtype=real)
    for b, span in chunks(q.device, rows, length, heads, k.shape[1]):
        texts = text_index[b]
        bias = text_bias(k.shape[1], text_length, key_bias, texts, real)
        key = without_masked(k[texts], bias)
        queries, keys = split_heads(q[b, span], heads).to(real), split_heads(key, heads).to(real)
        logits = attention_logits(q[b, span], key, bias, heads, scale)
        ds = torch.zeros_like(logits)
        if dout is not None and v is not None:
            p = probabilities(logits, saved[0, b, :, span])
            grad = split_heads(dout[b, span], heads).to(real)
            values = split_heads(without_masked(v[texts], bias), heads).to(real)
            dp = grad @ values.transpose(-1, -2)
            ds += p * (dp - (p * dp).sum(-1, keepdim=True))
            add_by_text(dv, texts, join_heads(p.transpose(-1, -2) @ grad))
        if dscore is not None:
            scored = logits
            if score_mask is not None:
                scored = logits.masked_fill(~score_mask[texts][:, None, None, :], float("-inf"))
            grad = (dscore[b] / length)[..., None] if mean else dscore[b, :, span]
            ds += probabilities(scored, saved[-1, b, :, span]) * grad[..., None].to(real)
        dq[b, span] = join_heads(ds @ keys) * scale
        add_by_text(dk, texts, join_heads(ds.transpose(-1, -2) @ queries) * scale)
        add_by_text(dbias, texts, ds.sum((1, 2)))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(q.dtype), dbias
