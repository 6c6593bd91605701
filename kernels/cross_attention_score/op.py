"""``dsd_fast::cross_attention_score``: the registered operator and the public function.

The operator is one node to ``torch.compile`` and ``torch.export``; its gradient is registered, and flows through the
score too, which no fused attention of aten offers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.common.attention import full_precision
from dsd_fast.kernels.cross_attention_score import reference

NAME = "cross_attention_score"


@torch.library.custom_op("dsd_fast::cross_attention_score", mutates_args=())
def _forward(
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
    backend.choose(NAME, ("reference",))
    with full_precision(q.device):
        return reference.forward(
            q, k, v, text_index, text_length, key_bias, score_mask, heads=heads, scale=scale, mean=mean, save=save
        )


@_forward.register_fake
def _forward_fake(
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
    rows, length, _ = q.shape
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(q.shape if v is not None else (0,))
    score = q.new_empty((rows, heads) if mean else (rows, heads, length), dtype=real)
    kept = (1 if score_mask is None else 2) if save else 0
    return out, score, q.new_empty((kept, rows, heads, length), dtype=real)


@torch.library.custom_op("dsd_fast::cross_attention_score_backward", mutates_args=())
def _backward(
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
    backend.choose(NAME, ("reference",))
    with full_precision(q.device):
        return reference.backward(
            dout,
            dscore,
            q,
            k,
            v,
            text_index,
            text_length,
            key_bias,
            score_mask,
            saved,
            heads=heads,
            scale=scale,
            mean=mean,
        )


@_backward.register_fake
def _backward_fake(
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
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    dv = q.new_empty(v.shape if v is not None else (0,))
    return torch.empty_like(q), torch.empty_like(k), dv, k.new_empty(k.shape[:2], dtype=real)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, text_index, text_length, key_bias, score_mask, heads, scale, mean, _ = inputs
    ctx.save_for_backward(q, k, v, text_index, text_length, key_bias, score_mask, output[2])
    ctx.heads, ctx.scale, ctx.mean = heads, scale, mean
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dscore: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, text_index, text_length, key_bias, score_mask, saved = ctx.saved_tensors
    if saved.shape[0] == 0:
        raise RuntimeError("cross_attention_score: a gradient is asked for, but save=False kept nothing for it")
    dq, dk, dv, dbias = _backward(
        dout,
        dscore,
        q,
        k,
        v,
        text_index,
        text_length,
        key_bias,
        score_mask,
        saved,
        heads=ctx.heads,
        scale=ctx.scale,
        mean=ctx.mean,
    )
    dbias = None if key_bias is None else dbias.to(key_bias.dtype)
    return dq, dk, None if v is None else dv, None, None, dbias, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.dsd_fast.cross_attention_score)
def _forward_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int] | None, *_: Any, **__: Any) -> int:
    """2·B·L·T·H·D for the logits and as much again for the output."""
    product = 2 * q[0] * q[1] * k[1] * q[2]
    return product * (1 if v is None else 2)


@register_flop_formula(torch.ops.dsd_fast.cross_attention_score_backward)
def _backward_flops(
    dout: Sequence[int] | None, dscore: Sequence[int] | None, q: Sequence[int], k: Sequence[int], *_: Any, **__: Any
) -> int:
    """The logits again, dq and dk: three products; two more, dP and dv, when the output has a gradient."""
    product = 2 * q[0] * q[1] * k[1] * q[2]
    return product * (3 if dout is None else 5)


def cross_attention_score(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    heads: int,
    text_index: Tensor | None = None,
    text_length: Tensor | None = None,
    key_bias: Tensor | None = None,
    score_mask: Tensor | None = None,
    scale: float | None = None,
    mean: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """Cross-attention and, in the same pass, the log-sum-exp of its logits.

    With S = q kᵀ·scale + key_bias: output = softmax(S) v, and score = log Σ exp(S) over the scored keys (natural
    logarithm), the quantity that DSD averages (He et al., arXiv 2305.10722, section 3). Accumulation and score are
    float32 for 16-bit and 32-bit inputs, float64 for float64. Differentiable (once) in q, k, v and key_bias,
    through the score too. Every size may be 0. A row all of whose keys are masked has output 0, score −inf and
    gradients 0.

    Args:
        q: (B, L, H·D) queries, any strides.
        k: (M, T, H·D) keys of the M texts, q's type.
        v: (M, T, H·D) values; None when only the score is wanted.
        heads: H.
        text_index: (B,) integer, the text of each row, in any order; None where M = B and row b has text b.
        text_length: (M,) integer; keys at or beyond it are not read.
        key_bias: (M, T) float32 (float64 with float64 inputs): −inf masks a key, log n lets it count n times.
        score_mask: (M, T) bool: the keys that count in the score; the output attends to all of them.
        scale: factor of the logits; None is D ** -0.5.
        mean: the score is averaged over the L positions (0 when L = 0).

    Returns:
        (output, score): output (B, L, H·D) in q's type, or None without ``v``; score (B, H, L), or (B, H) if ``mean``.

    Raises:
        ValueError: a shape, type or index that does not fit, by the argument's name.
    """
    rows, width, texts = _check(q, k, v, heads)
    if text_index is None:
        if texts != rows:
            raise ValueError(f"text_index: needed when k has {texts} texts for q's {rows} rows")
        text_index = torch.arange(rows, device=q.device)
    else:
        text_index = _check_index("text_index", text_index, (rows,), texts)
    if text_length is not None:
        text_length = _check_index("text_length", text_length, (texts,), k.shape[1] + 1)
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, value, dtype in (("key_bias", key_bias, real), ("score_mask", score_mask, torch.bool)):
        if value is not None and (value.shape != k.shape[:2] or value.dtype != dtype):
            raise ValueError(
                f"{name}: got {tuple(value.shape)} {value.dtype}, expected (M, T) = {tuple(k.shape[:2])} {dtype}"
            )
    differentiable = [x for x in (q, k, v, key_bias) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    if scale is None:
        scale = (width // heads) ** -0.5 if width else 1.0
    out, score, _ = _forward(
        q, k, v, text_index, text_length, key_bias, score_mask, heads=heads, scale=float(scale), mean=mean, save=save
    )
    return (None if v is None else out), score


def _check(q: Tensor, k: Tensor, v: Tensor | None, heads: int) -> tuple[int, int, int]:
    if q.ndim != 3 or heads < 1 or q.shape[2] % heads:
        raise ValueError(f"q: got {tuple(q.shape)}, expected (B, L, H·D) with H = heads = {heads}")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q: got {q.dtype}, expected a floating-point type")
    for name, value in (("k", k), ("v", v)):
        if value is None:
            continue
        if value.ndim != 3 or value.shape[2] != q.shape[2] or value.shape != k.shape:
            raise ValueError(f"{name}: got {tuple(value.shape)}, expected (M, T, {q.shape[2]}), the same for k and v")
        if value.dtype != q.dtype or value.device != q.device:
            raise ValueError(f"{name}: got {value.dtype} on {value.device}, expected {q.dtype} on {q.device} like q")
    return q.shape[0], q.shape[2], k.shape[0]


def _check_index(name: str, index: Tensor, shape: tuple[int, ...], limit: int) -> Tensor:
    if index.shape != shape or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: got {tuple(index.shape)} {index.dtype}, expected {shape} of int32 or int64")
    # Values on the GPU were checked on the host before their upload; reading them here would stall the stream.
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name}: values from {low} to {high}, expected 0 to {limit - 1}")
    return index.long()
