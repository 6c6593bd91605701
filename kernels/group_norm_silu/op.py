"""``dsd_fast::group_norm_silu``: the registered operator of the kernels, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsd_fast.kernels.common import elementwise
from dsd_fast.kernels.common.autograd import check_transforms
from dsd_fast.kernels.common.library import operator
from dsd_fast.kernels.group_norm_silu import reference

NAME = "group_norm_silu"


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not elementwise.runs_triton(x.device.type, x.dtype):
        y, mean, rstd = reference.forward(x, weight, bias, shift, groups, eps, silu)
        return y.contiguous(memory_format=reference.memory_format(x)), mean.contiguous(), rstd.contiguous()
    from dsd_fast.kernels.group_norm_silu import kernel

    return kernel.forward(x, weight, bias, shift, groups, eps, silu)


def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    groups: int,
    silu: bool,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not elementwise.runs_triton(x.device.type, x.dtype):
        dx, dweight, dbias, dshift = reference.backward(
            dy, x, mean, rstd, weight, bias, shift, groups, silu, parameters
        )
        return dx.contiguous(memory_format=reference.memory_format(x)), dweight, dbias, dshift
    from dsd_fast.kernels.group_norm_silu import kernel

    return kernel.backward(dy, x, mean, rstd, weight, bias, shift, groups, silu, parameters)


def _forward_fake(x, weight, bias, shift, groups, eps, silu):
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty((x.shape[0], groups), dtype=real)
    return torch.empty_like(x, memory_format=reference.memory_format(x)), mean, torch.empty_like(mean)


_FORWARD = operator(NAME, _forward, _forward_fake)


def _backward_fake(dy, x, mean, rstd, weight, bias, shift, groups, silu, parameters):
    dweight = mean.new_empty(x.shape[1] if parameters else 0)
    dshift = mean.new_empty(0 if shift is None else x.shape[:2])
    dx = torch.empty_like(x, memory_format=reference.memory_format(x))
    return dx, dweight, torch.empty_like(dweight), dshift


_BACKWARD = operator(f"{NAME}_backward", _backward, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, shift, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, shift, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 7
    x, weight, bias, shift, mean, rstd = ctx.saved_tensors
    need_x, need_weight, need_bias, need_shift, *_ = ctx.needs_input_grad
    dx, dweight, dbias, dshift = _BACKWARD(
        dy, x, mean, rstd, weight, bias, shift, ctx.groups, ctx.silu, need_weight or need_bias
    )
    return (
        dx if need_x else None,
        dweight.to(weight.dtype) if need_weight else None,
        dbias.to(bias.dtype) if need_bias else None,
        dshift.to(shift.dtype) if need_shift else None,
        None,
        None,
        None,
    )


torch.library.register_autograd("dsd_fast::group_norm_silu", _differentiate, setup_context=_setup_context)


def native(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> Tensor:
    """What :func:`group_norm_silu` returns, by the compiled library: channels-last float32 on a CPU, no gradient."""
    y = torch.empty_like(x)
    weight, bias, shift = elementwise.dense(weight), elementwise.dense(bias), elementwise.dense(shift)
    torch.ops.dsd_fast_cpu.group_norm_silu.default(x, y, weight, bias, shift, groups, eps, silu)
    return y


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Group norm of an image, with the time embedding that precedes it and the SiLU that follows it, in one operator.

    u = (x + shift − mean)/√(variance + eps)·weight + bias with mean and variance of each group of C/groups channels of
    each image (Wu and He, arXiv 1803.08494); the result is u·sigmoid(u), or u. Arithmetic is float32 for 16-bit and
    32-bit inputs, float64 for float64; the kernels take the variance about the mean, never as E[x²] − E[x]². In plain
    torch, which rounds between its operators, that is up to torch. Differentiable (once) in x, shift, weight and bias.
    Every size may be 0.

    Args:
        x: (B, C, h, w) floating point, any strides.
        weight, bias: (C,), x's type or, the same for both, float32; None leaves the factor or the term out.
        groups: how many groups the channels make, a divisor of C.
        eps: added to the variance.
        shift: (B, C) in x's type, added to every position of x first.
        silu: whether SiLU follows.

    Returns:
        (B, C, h, w) in x's type; channels-last where x is, contiguous else.

    Raises:
        ValueError: a shape, type or number of groups that does not fit, by the argument's name.
        NotImplementedError: the kernels run, and a gradient is asked for by forward mode or by a transform of
            torch.func.
    """
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"x: got {tuple(x.shape)} {x.dtype}, expected (B, C, h, w) of a floating-point type")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: got {groups}, expected a divisor of x's {x.shape[1]} channels")
    elementwise.check_parameters(weight, bias, x.shape[1], x.dtype)
    if shift is not None and (shift.shape != x.shape[:2] or shift.dtype != x.dtype):
        raise ValueError(
            f"shift: got {tuple(shift.shape)} {shift.dtype}, expected (B, C) = {tuple(x.shape[:2])} {x.dtype} like x"
        )
    if x.is_contiguous(memory_format=torch.channels_last) and elementwise.runs_native(NAME, x, weight, bias, shift):
        return native(x, weight, bias, shift, groups, eps, silu)
    if elementwise.choose(NAME, x.device.type, x.dtype) == "reference":
        return reference.group_norm_silu(x, weight, bias, shift, groups, eps, silu)
    check_transforms(NAME, x, weight, bias, shift)
    y: Tensor = _FORWARD(x, weight, bias, shift, groups, eps, silu)[0]
    return y
