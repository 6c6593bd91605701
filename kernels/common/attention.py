"""What the plain-torch attention operators share: heads, biases, logits and the chunks they are worked through in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Logits held at once. On a CPU 4 MiB of float32, a core's share of the last-level cache; a GPU needs far more of them
# to be busy.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
# Tensors of that size alive at a time: logits, what they become, and a mask.
CHUNK_COPIES = 4


def real_dtype(x: Tensor) -> torch.dtype:
    """The type of the arithmetic: float64 for float64, float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunk_elements(device: torch.device) -> int:
    """How many logits the operators hold at once on ``device``."""
    return CHUNK_ELEMENTS["cuda" if device.type == "cuda" else "cpu"]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in the type of their operands: neither autocast nor tf32 lowers them."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if device.type == "cuda":
        matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if device.type == "cuda":
            matmul.fp32_precision = before


def chunks(device: torch.device, rows: int, length: int, heads: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of (rows, positions) of a bounded number of logits: whole rows where they fit, else parts of one."""
    limit = chunk_elements(device)
    per_position = max(1, heads * tokens)
    positions = max(1, min(length, limit // per_position))
    block = max(1, limit // (per_position * positions)) if positions == length else 1
    for b in range(0, rows, block):
        for start in range(0, length, positions):
            yield slice(b, min(b + block, rows)), slice(start, min(start + positions, length))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, l, H·D) → (b, H, l, D)."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(b, H, l, D) → (b, l, H·D)."""
    return x.transpose(1, 2).flatten(2)


def text_bias(
    tokens: int, text_length: Tensor | None, key_bias: Tensor | None, texts: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """(b, T): the key bias of each row's text, −inf at and beyond its length; None where there is neither."""
    bias = None if key_bias is None else key_bias[texts]
    if text_length is not None:
        beyond = torch.arange(tokens, device=texts.device) >= text_length[texts][:, None]
        bias = (torch.zeros_like(beyond, dtype=dtype) if bias is None else bias).masked_fill(beyond, float("-inf"))
    return bias


def attention_logits(q: Tensor, k: Tensor, bias: Tensor | None, heads: int, scale: float) -> Tensor:
    """(b, H, l, T) = q kᵀ·scale + bias, from q (b, l, H·D), k (b, T, H·D) without masked keys, and bias (b, T)."""
    real = real_dtype(q)
    logits = (split_heads(q, heads).to(real) * scale) @ split_heads(k, heads).to(real).transpose(-1, -2)
    if bias is None:
        return logits
    return logits + bias[:, None, None, :]


def without_masked(x: Tensor, bias: Tensor | None) -> Tensor:
    """Keys or values (b, T, H·D), zeros where ``bias`` (b, T) is −inf: what is masked may hold anything, also NaN."""
    return x if bias is None else x.masked_fill((bias == float("-inf"))[..., None], 0.0)


def probabilities(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits − lse), logits (b, H, l, T), lse (b, H, l); 0 where every key is masked (lse = −inf)."""
    return torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
