"""A network of one's own on weights that others use too; the network inside a compiled one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def private(network: Any, copied: Callable[[str], bool] = lambda name: False) -> Any:
    """The same modules anew, on the same memory: what is attached to them does not touch ``network``.

    A write to a weight is seen by both. A weight that is replaced, as moving the network to another device does, is
    not. No parameter of the result wants a gradient.

    Args:
        network: any module.
        copied: by a parameter's name, whether the result has it in memory of its own.
    """
    memo: dict[int, Any] = {}
    for name, parameter in network.named_parameters():
        value = parameter.detach()
        memo[id(parameter)] = nn.Parameter(value.clone() if copied(name) else value, requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(network, memo)


def check_ordinary(what: str, networks: Mapping[str, nn.Module]) -> None:
    """Refuse networks through which no gradient can go.

    Args:
        what: is refused.
        networks: by what errors call them.

    Raises:
        ValueError: a weight that was made under torch.inference_mode, by its name.
    """
    for part, network in networks.items():
        for name, parameter in network.named_parameters():
            if parameter.is_inference():
                raise ValueError(
                    f"{what}: {part}.{name} was made under torch.inference_mode, and such a tensor takes part in no "
                    "gradient; load the model, or the adapter, outside of it"
                )


def uncompiled(network: Any) -> Any:
    """The module that ``torch.compile`` wrapped, on the same weights; any other object itself.

    What is compiled is the forward method of the whole, which a plan goes around. A module that compiles itself in
    place (``module.compile()``) is called by its parts just as well, and needs nothing.
    """
    # Importing Dynamo takes longer than the rest of the package, and where nobody has, nothing is compiled.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    while dynamo is not None and isinstance(network, dynamo.OptimizedModule):
        network = network._orig_mod
    return network


def compiled_forward(module: nn.Module) -> bool:
    """Whether the forward put on a module is its class's own, compiled: ``m.forward = torch.compile(m.forward)``."""
    inside = getattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
    return getattr(inside, "__func__", None) is type(module).forward and getattr(inside, "__self__", None) is module
