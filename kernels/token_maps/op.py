"""``dsd_fast::token_maps``: the registered operator and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.common.attention import (
    check_index,
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
from dsd_fast.kernels.token_maps import reference

NAME = "token_maps"


def _forward(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    text_index: Tensor | None,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    heads: int,
    scale: float,
) -> Tensor:
    name = choose(NAME, q, heads)
    options = (text_length, key_bias, heads, scale)
    if name == "triton":
        from dsd_fast.kernels.token_maps import kernel

        return kernel.forward(q, k, tokens, text_index, *options)
    texts = rows_texts(text_index, q.shape[0], q.device)
    if name == "cpu":
        maps: Tensor = torch.ops.dsd_fast_cpu.token_maps(q, k, tokens, texts, *options)
        return maps
    with full_precision(q.device):
        return reference.forward(q, k, tokens, texts, *options)


def _forward_fake(q, k, tokens, text_index, text_length, key_bias, heads, scale):
    return q.new_empty((*tokens.shape, q.shape[1]), dtype=real_dtype(q))


_FORWARD = operator(NAME, _forward, _forward_fake)


def _backward(
    dmaps: Tensor,
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    text_index: Tensor | None,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    heads: int,
    scale: float,
    query: bool = True,
    text: bool = True,
    forced: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    name = choose(NAME, q, heads, forced)
    options = (text_length, key_bias, heads, scale)
    found: Sequence[Tensor | None]
    if name == "triton":
        from dsd_fast.kernels.token_maps import kernel

        found = kernel.backward(dmaps, q, k, tokens, text_index, *options, query=query, text=text)
    else:
        # The CPU library has no gradient of maps: they are few, and plain torch's.
        with full_precision(q.device):
            found = reference.backward(dmaps, q, k, tokens, rows_texts(text_index, q.shape[0], q.device), *options)
    wanted = (query, text, text and key_bias is not None)
    gradients: tuple[Tensor, Tensor, Tensor] = without_none(found, wanted, q)
    return gradients


def _backward_fake(
    dmaps, q, k, tokens, text_index, text_length, key_bias, heads, scale, query=True, text=True, forced=None
):
    return (
        q.new_empty(q.shape if query else (0,)),
        k.new_empty(k.shape if text else (0,)),
        k.new_empty(k.shape[:2], dtype=real_dtype(q)) if text and key_bias is not None else q.new_empty(0),
    )


_BACKWARD = operator(f"{NAME}_backward", _backward, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, heads, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.heads, ctx.scale, ctx.forced = heads, scale, backend.forced_for(NAME)


def _differentiate(ctx: Any, dmaps: Tensor) -> tuple[Any, ...]:
    query, keys, _, _, _, bias, *_ = ctx.needs_input_grad
    text = keys or bias
    dq, dk, dbias = _BACKWARD(dmaps, *ctx.saved_tensors, ctx.heads, ctx.scale, query, text, ctx.forced)
    return dq if query else None, dk if keys else None, None, None, None, dbias if bias else None, None, None


torch.library.register_autograd(f"dsd_fast::{NAME}", _differentiate, setup_context=_setup_context)


class _Differentiable(torch.autograd.Function):
    """The registered gradient without the registration's cost, which is many times that of a small call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output: Tensor = _FORWARD(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(once_differentiable(_differentiate))  # type: ignore[assignment]


@register_flop_formula(torch.ops.dsd_fast.token_maps)
def _forward_flops(q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    """2·B·L·T·H·D for the logits; the maps are some of them."""
    return 2 * q[0] * q[1] * k[1] * q[2]


@register_flop_formula(torch.ops.dsd_fast.token_maps_backward)
def _backward_flops(dmaps: Sequence[int], q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    """The logits again, dq and dk."""
    return 3 * 2 * q[0] * q[1] * k[1] * q[2]


def token_maps(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    text_index: Tensor | None,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    heads: int,
    scale: float,
) -> Tensor:
    """Attention probabilities of chosen tokens, averaged over heads: what a heat map of a word needs.

    With S = q kᵀ·scale + key_bias: maps[b, i] = mean over heads of softmax(S)[:, tokens[b, i]]. Arithmetic and result
    are float32 for 16-bit and 32-bit inputs, float64 for float64. Differentiable (once) in q, k and key_bias. Every
    size may be 0. Masked tokens have maps of 0, and so has a row all of whose keys are masked.

    Args:
        q: (B, L, H·D) queries, any strides.
        k: (M, T, H·D) keys of the M texts, q's type.
        tokens: (B, n) int64, positions in the text of each row; repeats are allowed.
        text_index: (B,) integer, the text of each row, in any order; None where M = B and row b has text b.
        text_length: (M,) integer; keys at or beyond it are not read.
        key_bias: (M, T) float32 (float64 with float64 inputs): −inf masks a key, log n lets it count n times.
        heads: H.
        scale: factor of the logits.

    Returns:
        (B, n, L) maps.

    Raises:
        ValueError: a shape, type or index that does not fit, by the argument's name.
        NotImplementedError: a gradient is asked for by forward mode or by a transform of torch.func.
    """
    check_projections(q, heads, k=k)
    if tokens.ndim != 2:
        raise ValueError(f"tokens: got {tuple(tokens.shape)}, expected (B, n) with B = {q.shape[0]}")
    tokens = check_index("tokens", tokens, (q.shape[0], tokens.shape[1]), k.shape[1])
    text_index, text_length = check_texts(text_index, text_length, q.shape[0], k)
    check_per_key("key_bias", key_bias, k, real_dtype(q))
    check_transforms(NAME, q, k, key_bias)
    inputs = (q, k, tokens, text_index, text_length, key_bias, heads, float(scale))
    if torch.compiler.is_compiling():
        maps: Tensor = _FORWARD(*inputs)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, key_bias)):
        maps = _Differentiable.apply(*inputs)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            maps = _FORWARD(*inputs)
    return maps
