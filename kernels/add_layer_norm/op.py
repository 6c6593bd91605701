"""``dsd_fast::add_layer_norm``: the registered operator of the kernels, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsd_fast.kernels.add_layer_norm import reference
from dsd_fast.kernels.common import elementwise
from dsd_fast.kernels.common.autograd import check_transforms
from dsd_fast.kernels.common.library import operator

NAME = "add_layer_norm"


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not elementwise.runs_triton(x.device.type, x.dtype):
        total, normed, mean, rstd = reference.forward(x, residual, weight, bias, eps)
        return total.contiguous(), normed.contiguous(), mean.contiguous(), rstd.contiguous()
    from dsd_fast.kernels.add_layer_norm import kernel

    return kernel.forward(x, residual, weight, bias, eps)


def _backward(
    dsum: Tensor | None,
    dnormed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not elementwise.runs_triton(total.device.type, total.dtype):
        dx, dweight, dbias = reference.backward(dsum, dnormed, total, mean, rstd, weight, parameters)
        return dx.contiguous(), dweight, dbias
    from dsd_fast.kernels.add_layer_norm import kernel

    return kernel.backward(dsum, dnormed, total, mean, rstd, weight, parameters)


def _forward_fake(x, residual, weight, bias, eps):
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty(x.shape[:-1], dtype=real)
    return x.new_empty(x.shape if residual is not None else (0,)), x.new_empty(x.shape), mean, torch.empty_like(mean)


_FORWARD = operator(NAME, _forward, _forward_fake)


def _backward_fake(dsum, dnormed, total, mean, rstd, weight, parameters):
    dweight = mean.new_empty(total.shape[-1] if parameters else 0)
    return total.new_empty(total.shape), dweight, torch.empty_like(dweight)


_BACKWARD = operator(f"{NAME}_backward", _backward, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, bias, mean, rstd)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dsum: Tensor | None, dnormed: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    total, weight, bias, mean, rstd = ctx.saved_tensors
    if dsum is not None and dsum.shape != total.shape:
        dsum = None
    if dnormed is None:
        return dsum, dsum, None, None, None
    need_x, need_residual, need_weight, need_bias, _ = ctx.needs_input_grad
    dx, dweight, dbias = _BACKWARD(dsum, dnormed, total, mean, rstd, weight, need_weight or need_bias)
    return (
        dx if need_x else None,
        dx if need_residual else None,
        dweight.to(weight.dtype) if need_weight else None,
        dbias.to(bias.dtype) if need_bias else None,
        None,
    )


torch.library.register_autograd("dsd_fast::add_layer_norm", _differentiate, setup_context=_setup_context)


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The sum of a residual stream and what joins it, and the layer norm of that sum, in one pass.

    sum = x + residual, rounded to their type: what later steps read. normed = (sum − mean)/√(variance + eps)·weight
    + bias over the last dimension (Ba et al., arXiv 1607.06450), from the rounded sum, so that it is what two operators
    give. Arithmetic is float32 for 16-bit and 32-bit inputs, float64 for float64. Differentiable (once) in x, residual,
    weight and bias, through both outputs. Every size may be 0.

    Args:
        x: (..., C) floating point, any strides.
        residual: x's shape and type; None for a plain layer norm.
        weight, bias: (C,), x's type or, the same for both, float32; None leaves the factor or the term out.
        eps: added to the variance.

    Returns:
        (sum, normed), each (..., C) in x's type; without ``residual`` the sum is x itself.

    Raises:
        ValueError: a shape or type that does not fit, by the argument's name.
        NotImplementedError: the kernels run, and a gradient is asked for by forward mode or by a transform of
            torch.func.
    """
    if x.ndim == 0 or not x.dtype.is_floating_point:
        raise ValueError(f"x: got {tuple(x.shape)} {x.dtype}, expected (..., C) of a floating-point type")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual: got {tuple(residual.shape)} {residual.dtype}, expected {tuple(x.shape)} {x.dtype} like x"
        )
    elementwise.check_parameters(weight, bias, x.shape[-1], x.dtype)
    if elementwise.choose(NAME, x.device.type, x.dtype) == "reference":
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    check_transforms(NAME, x, residual, weight, bias)
    total, normed, _, _ = _FORWARD(x, residual, weight, bias, eps)
    return (x if residual is None else total), normed
