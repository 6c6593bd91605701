"""Operators of the namespace ``dsd_fast``, registered from a function's own signature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


# `torch.library.custom_op` takes several times as long a call as an operator that is defined and implemented so.
def operator(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], *, mutates: Iterable[str] = ()
) -> torch._ops.OpOverload:
    """Registers ``function`` for CPUs and CUDA devices as ``dsd_fast::name``, one node to compilers and exporters.

    Args:
        name: of the operator.
        function: its annotations are the operator's schema.
        fake: the same arguments to tensors of the result's shapes, types and layout, without values.
        mutates: arguments that are written to.

    Returns:
        The operator, as it is called.
    """
    qualified = f"dsd_fast::{name}"
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, ("cpu", "cuda"), function)
    torch.library.register_fake(qualified, fake)
    called: torch._ops.OpOverload = getattr(torch.ops.dsd_fast, name).default
    return called


def untransformed() -> bool:
    """Whether operators compute plainly: under no mode, no transform of torch.func and no forward-mode level."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def unseen(*inputs: Tensor | None) -> bool:
    """Whether nobody sees an operator run on ``inputs``: no mode, transform, profiler or subclass of tensors.

    Its function may then be called without torch's dispatch, which takes longer than a small call's work.
    """
    return (
        untransformed()
        and not torch._C._autograd._profiler_enabled()
        and all(x is None or (type(x) is Tensor and (x.is_cpu or x.is_cuda)) for x in inputs)
    )


def without_none(results: Sequence[Tensor | None], wanted: Sequence[bool], like: Tensor) -> Any:
    """An operator's results, empty ones for those that are not wanted or not there: a schema has no optional results.

    Args:
        results: a tensor or None each.
        wanted: whether each is asked for.
        like: gives the empty ones their type and device.
    """
    return tuple(
        result if asked and result is not None else like.new_empty(0)
        for result, asked in zip(results, wanted, strict=True)
    )


def traced() -> bool:
    """Whether torch.compile or torch.export traces this call: torch's own flag is up in every thread meanwhile."""
    if torch.compiler.is_dynamo_compiling():
        return True
    # An export without Dynamo runs the call itself, under modes that are the thread's.
    return torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
