"""``dsd_fast::geglu``: the registered operator of the kernels, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsd_fast.kernels.common import elementwise
from dsd_fast.kernels.common.autograd import check_transforms
from dsd_fast.kernels.common.library import operator
from dsd_fast.kernels.geglu import reference

NAME = "geglu"


def _forward(x: Tensor) -> Tensor:
    if not elementwise.runs_triton(x.device.type, x.dtype):
        return reference.forward(x).contiguous()
    from dsd_fast.kernels.geglu import kernel

    return kernel.forward(x)


def _backward(dy: Tensor, x: Tensor) -> Tensor:
    if not elementwise.runs_triton(x.device.type, x.dtype):
        return reference.backward(dy, x).contiguous()
    from dsd_fast.kernels.geglu import kernel

    return kernel.backward(dy, x)


def _forward_fake(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


_FORWARD = operator(NAME, _forward, _forward_fake)


def _backward_fake(dy, x):
    return x.new_empty(x.shape)


_BACKWARD = operator(f"{NAME}_backward", _backward, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    dx: Tensor = _BACKWARD(dy, x)
    return dx


torch.library.register_autograd("dsd_fast::geglu", _differentiate, setup_context=_setup_context)


def native(x: Tensor) -> Tensor:
    """What :func:`geglu` returns, by the compiled library: x (..., 2N) float32 on a CPU, no gradient."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    torch.ops.dsd_fast_cpu.geglu.default(x, y)
    return y


def geglu(x: Tensor) -> Tensor:
    """A value times the gelu of its gate, in one pass: value·gate·Φ(gate), Φ the normal distribution function.

    The activation of Stable Diffusion's feed-forward blocks (Shazeer, arXiv 2002.05202), with the exact gelu.
    Arithmetic is float32 for 16-bit and 32-bit inputs, float64 for float64. Differentiable (once). Every size may be 0.

    Args:
        x: (..., 2N) floating point, any strides; the first N of the last dimension are the value, the others the gate.

    Returns:
        (..., N) in x's type.

    Raises:
        ValueError: x is no floating-point tensor, or its last dimension is missing or odd.
        NotImplementedError: the kernels run, and a gradient is asked for by forward mode or by a transform of
            torch.func.
    """
    if x.ndim == 0 or x.shape[-1] % 2 or not x.dtype.is_floating_point:
        raise ValueError(f"x: got {tuple(x.shape)} {x.dtype}, expected (..., 2·N) of a floating-point type")
    if elementwise.runs_native(NAME, x):
        return native(x)
    if elementwise.choose(NAME, x.device.type, x.dtype) == "reference":
        return reference.forward(x)
    check_transforms(NAME, x)
    y: Tensor = _FORWARD(x)
    return y
