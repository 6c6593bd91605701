"""What the operators, whose gradients are reverse mode's alone, refuse of torch's other ways to differentiate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_transforms(operator: str, *inputs: Tensor | None) -> None:
    """Of the differentiable inputs of ``operator``.

    Raises:
        NotImplementedError: one has a forward-mode tangent, which torch would drop in silence, or a gradient that a
            transform of torch.func would take.
    """
    # Both say no in less time than any look at a tensor.
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
        for x in inputs
    ):
        raise NotImplementedError(
            f"{operator}: got an input with a forward-mode tangent (torch.autograd.forward_ad, torch.func.jvp), "
            "expected reverse mode, such as torch.autograd.grad"
        )
    if torch._C._are_functorch_transforms_active() and any(x is not None and x.requires_grad for x in inputs):
        raise NotImplementedError(
            f"{operator}: got an input that requires a gradient inside a transform of torch.func, expected "
            "torch.autograd.grad"
        )
