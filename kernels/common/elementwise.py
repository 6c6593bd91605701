"""What the memory-bound operators share: the choice of an implementation, and tensors as matrices of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dsd_fast.kernels.common import backend, native
from dsd_fast.kernels.common.library import traced, unseen


def runs_triton(device: str, dtype: torch.dtype) -> bool:
    """Whether Triton kernels run: on CUDA devices, and on the CPU under Triton's interpreter; never in float64."""
    return "triton" in backend.available(device, dtype)


# A compiler calls it once and keeps the answer: plain torch is then traced into, and fused, without a graph break.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(operator: str, device: str, dtype: torch.dtype, *, fuses: bool = True) -> str:
    """The implementation of ``operator`` for such inputs, unless one is forced.

    ``fuses`` says whether it stands in compiled code, where a compiler fuses plain torch with what surrounds it: plain
    torch is then the default; else the kernels are, on a GPU. A compiled graph keeps the choice that it was traced
    with.
    """
    available = ["reference", "triton"] if runs_triton(device, dtype) else ["reference"]
    if not fuses and device == "cuda":
        available.reverse()
    return backend.choose(operator, available)


def runs_native(operator: str, *inputs: Tensor | None) -> bool:
    """Whether the compiled library of ``csrc/`` computes ``operator`` for such inputs, unless another one is forced.

    It takes float32 on CPUs, where no gradient is wanted and nothing but the result is looked at.
    """
    return (
        all(x is None or (x.dtype is torch.float32 and x.is_cpu) for x in inputs)
        and not traced()
        and not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs))
        and unseen(*inputs)
        and prefers_native(operator)
        and backend.choose(operator, ("cpu",)) == "cpu"
    )


def prefers_native(operator: str) -> bool:
    """Whether the compiled library comes first on this processor, and nothing else is forced.

    Without vectors of 8 numbers it is slower than torch.
    """
    names = backend.available("cpu", torch.float32)
    return native.has(operator) and native.capability() != "baseline" and backend.choice(operator, names) == "cpu"


def as_rows(x: Tensor) -> Tensor:
    """(rows, width) with the last dimension dense: a view of x (..., width) where its strides allow it, else a copy."""
    rows = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def check_parameters(weight: Tensor | None, bias: Tensor | None, channels: int, dtype: torch.dtype) -> None:
    """Of a norm with inputs of ``dtype``.

    Raises:
        ValueError: a shape or type that does not fit, by the argument's name.
    """
    expected = {dtype, torch.float32 if dtype in backend.KERNEL_DTYPES else dtype}
    if weight is not None and bias is not None:
        expected = {weight.dtype} & expected or expected
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and (value.shape != (channels,) or value.dtype not in expected):
            types = " or ".join(sorted(str(kind) for kind in expected))
            raise ValueError(f"{name}: got {tuple(value.shape)} {value.dtype}, expected ({channels},) {types}")


def dense(x: Tensor | None) -> Tensor | None:
    """A vector or matrix whose elements follow each other, as kernels read parameters."""
    return None if x is None else x.contiguous()
