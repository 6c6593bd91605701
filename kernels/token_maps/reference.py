"""Attention probabilities of chosen tokens, averaged over heads, in plain torch.

Letters: B rows, M texts, H heads, D head width, L image positions, T text tokens. Arithmetic is float32 whatever the
inputs' type (float64 stays float64), in chunks, so that no tensor of size H·L·T ever exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.common.attention import (
    attention_logits,
    chunks,
    full_precision,
    probabilities,
    real_dtype,
    text_bias,
    without_masked,
)


def token_maps(
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
    backend.choose("token_maps", ("reference",))
    rows, length, _ = q.shape
    real = real_dtype(q)
    parts: dict[int, list[Tensor]] = {}
    for b, span in chunks(q.device, rows, length, heads, k.shape[1]):
        texts = text_index[b]
        bias = text_bias(k.shape[1], text_length, key_bias, texts, real)
        with full_precision(q.device):
            logits = attention_logits(q[b, span], without_masked(k[texts], bias), bias, heads, scale)
        chosen = tokens[b][:, None, None, :].expand(-1, heads, logits.shape[2], -1)
        p = probabilities(logits.gather(-1, chosen), torch.logsumexp(logits, dim=-1))
        parts.setdefault(b.start, []).append(p.mean(1).transpose(1, 2))
    if not parts:
        return q.new_zeros((rows, tokens.shape[1], length), dtype=real)
    return torch.cat([torch.cat(row, dim=-1) for row in parts.values()])
