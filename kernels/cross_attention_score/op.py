"""``dsd_fast::cross_attention_score``: the registered operator and the public function.

The operator is one node to ``torch.compile`` and ``torch.export``; its gradient is registered, and flows through the
score too, which no fused attention of aten offers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.common.attention import (
    check_per_key,
    check_projections,
    check_texts,
    choose,
    full_precision,
    real_dtype,
    rows_texts,
)
from dsd_fast.kernels.common.autograd import check_transforms
from dsd_fast.kernels.common.library import operator, without_none
from dsd_fast.kernels.cross_attention_score import reference

NAME = "cross_attention_score"


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    text_index: Tensor | None,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    score_mask: Tensor | None,
    heads: int,
    scale: float,
    mean: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    name = choose(NAME, q, heads)
    options = (text_length, key_bias, score_mask, heads, scale, mean, save)
    if name == "triton":
        from dsd_fast.kernels.cross_attention_score import kernel

        return kernel.forward(q, k, v, text_index, *options)
    texts = rows_texts(text_index, q.shape[0], q.device)
    if name == "cpu":
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.dsd_fast_cpu.cross_attention_score(q, k, v, texts, *options)
        return result
    with full_precision(q.device):
        return reference.forward(q, k, v, texts, *options)


def _forward_fake(q, k, v, text_index, text_length, key_bias, score_mask, heads, scale, mean, save):
    rows, length, _ = q.shape
    out = q.new_empty(q.shape if v is not None else (0,))
    score = q.new_empty((rows, heads) if mean else (rows, heads, length), dtype=real_dtype(q))
    kept = (1 if score_mask is None else 2) if save else 0
    return out, score, q.new_empty((kept, rows, heads, length), dtype=real_dtype(q))


_FORWARD = operator(NAME, _forward, _forward_fake)


def _backward(
    dout: Tensor | None,
    dscore: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    text_index: Tensor | None,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    score_mask: Tensor | None,
    saved: Tensor,
    heads: int,
    scale: float,
    mean: bool,
    query: bool = True,
    text: bool = True,
    forced: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = choose(NAME, q, heads, forced)
    options = (text_length, key_bias, score_mask, saved, heads, scale, mean)
    found: Sequence[Tensor | None]
    if name == "triton":
        from dsd_fast.kernels.cross_attention_score import kernel

        found = kernel.backward(dout, dscore, q, k, v, text_index, *options, query=query, text=text)
    else:
        texts = rows_texts(text_index, q.shape[0], q.device)
        if name == "cpu":
            library = torch.ops.dsd_fast_cpu
            found = library.cross_attention_score_backward(dout, dscore, q, k, v, texts, *options)
        else:
            with full_precision(q.device):
                found = reference.backward(dout, dscore, q, k, v, texts, *options)
    wanted = (query, text, text and v is not None, text and key_bias is not None)
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = without_none(found, wanted, q)
    return gradients


def _backward_fake(
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
    heads,
    scale,
    mean,
    query=True,
    text=True,
    forced=None,
):
    return (
        q.new_empty(q.shape if query else (0,)),
        k.new_empty(k.shape if text else (0,)),
        q.new_empty(v.shape if text and v is not None else (0,)),
        k.new_empty(k.shape[:2], dtype=real_dtype(q)) if text and key_bias is not None else q.new_empty(0),
    )


_BACKWARD = operator(f"{NAME}_backward", _backward, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, text_index, text_length, key_bias, score_mask, heads, scale, mean, _ = inputs
    ctx.save_for_backward(q, k, v, text_index, text_length, key_bias, score_mask, output[2])
    ctx.heads, ctx.scale, ctx.mean, ctx.forced = heads, scale, mean, backend.forced_for(NAME)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dscore: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, text_index, text_length, key_bias, score_mask, saved = ctx.saved_tensors
    if saved.shape[0] == 0:
        raise RuntimeError("cross_attention_score: a gradient is asked for, but save=False kept nothing for it")
    query, keys, values, _, _, bias, *_ = ctx.needs_input_grad
    text = keys or values or bias
    dq, dk, dv, dbias = _BACKWARD(
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
        ctx.heads,
        ctx.scale,
        ctx.mean,
        query,
        text,
        ctx.forced,
    )
    dbias = None if key_bias is None or not text else dbias.to(key_bias.dtype)
    dv = None if v is None or not text else dv
    return dq if query else None, dk if text else None, dv, None, None, dbias, None, None, None, None, None


torch.library.register_autograd(f"dsd_fast::{NAME}", _differentiate, setup_context=_setup_context)


class _Differentiable(torch.autograd.Function):
    """The registered gradient without the registration's cost, which is many times that of a small call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            output: tuple[Tensor, Tensor, Tensor] = _FORWARD(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])
        return output

    backward = staticmethod(once_differentiable(_differentiate))  # type: ignore[assignment]


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
        NotImplementedError: a gradient is asked for by forward mode or by a transform of torch.func.
    """
    check_projections(q, heads, k=k, v=v)
    text_index, text_length = check_texts(text_index, text_length, q.shape[0], k)
    check_per_key("key_bias", key_bias, k, real_dtype(q))
    check_per_key("score_mask", score_mask, k, torch.bool)
    check_transforms(NAME, q, k, v, key_bias)
    if scale is None:
        width = q.shape[2] // heads
        scale = width**-0.5 if width else 1.0
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, key_bias))
    inputs = (q, k, v, text_index, text_length, key_bias, score_mask, heads, float(scale), mean, save)
    if torch.compiler.is_compiling():
        out, score, _ = _FORWARD(*inputs)
    elif save:
        out, score, _ = _Differentiable.apply(*inputs)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            out, score, _ = _FORWARD(*inputs)
    return (None if v is None else out), score
