"""When an operator's result is right: against float64, as far off as plain torch is in the same type, twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MEASURE = "largest error, in units of its limit (twice plain torch's own and one rounding)"
TOLERANCE = 1.0


class Judge:
    """Measures results of several tensors against the truth.

    The limit of each tensor is twice the largest error of plain torch in the same type, plus one unit in the last place
    of the tensor's largest value.

    Args:
        truth: the right result, in float64.
        plain: plain torch's result.
        dtypes: that are judged; None takes those of the plain tensors.
    """

    def __init__(
        self, truth: Sequence[Tensor], plain: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None
    ) -> None:
        self.truth = [right.double() for right in truth]
        self.limits = [
            2 * _largest(value.double() - right) + torch.finfo(dtype).eps * _largest(right)
            for value, right, dtype in zip(plain, self.truth, dtypes or [value.dtype for value in plain], strict=True)
        ]

    def __call__(self, result: Sequence[Tensor | None], truth: Sequence[Tensor]) -> float:
        """The largest error of any of the tensors, in units of its limit; None where a side does not make one."""
        errors = [
            _largest(value.double() - right) / max(limit, torch.finfo(torch.float64).tiny)
            for value, right, limit in zip(result, truth, self.limits, strict=True)
            if value is not None
        ]
        # Not max(), which a NaN passes unseen.
        return float(torch.tensor(errors).amax())


def gradients(
    call: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    leaves: int | None = None,
) -> Callable[[], Sequence[Tensor]]:
    """Make the backward pass of a call, whose forward pass is run now.

    Args:
        call: (inputs) → results.
        inputs: their first ``leaves`` have gradients, all of them if None.
        upstream: gradients of the results, of any type.
    """
    own = [x.detach().requires_grad_() for x in inputs[:leaves]]
    results = call(*own, *inputs[len(own) :])
    grads = [grad.to(result.dtype) for grad, result in zip(upstream, results, strict=True)]
    return lambda: torch.autograd.grad(results, own, grads, retain_graph=True)


def _largest(x: Tensor) -> float:
    return float(x.abs().amax()) if x.numel() else 0.0
