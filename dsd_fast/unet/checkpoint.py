"""Gradient checkpointing: a region's activations are dropped in the forward pass and computed again in the backward.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from dsd_fast.models.tuners import own_backward, setting, standing
from dsd_fast.unet.network import Network

# Runs a function of tensors: call(function, *arguments).
Call = Callable[..., Any]


class Checkpoints:
    """The checkpoints of one run, which goes through its backward pass under what it was run under.

    That pass happens outside of the plan's call. torch brings back autocast and the state of the random generators;
    the adapters and the implementations that were forced are brought back here. A region of which no input and no
    weight wants a gradient is kept nothing of, and is not computed again.
    """

    def __init__(self, network: Network) -> None:
        self._module, self._weights = network.module, network.weights
        self._written = self._weights.written()
        self._adapters = setting(self._module)
        self._checked: int | None = None
        own_backward()

    def around(self, call: Call | None) -> Call:
        """``call`` with a checkpoint around it; None: the function is simply called."""

        def checkpointed(function: Callable[..., Any], *arguments: Any) -> Any:
            # Tensors are handed over one by one, because only so torch notices when one is written to before it is
            # read again.
            leaves, structure = tree_flatten(arguments)
            places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            tensors = [leaves[place] for place in places]
            leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            context = copy_context()

            def run(*given: Tensor) -> Any:
                values = list(leaves)
                for place, tensor in zip(places, given, strict=True):
                    values[place] = tensor
                whole = tree_unflatten(values, structure)
                return context.run(function, *whole) if call is None else context.run(call, function, *whole)

            return checkpoint(run, *tensors, use_reentrant=False, context_fn=self._contexts)

        return checkpointed

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._again()

    @contextmanager
    def _again(self) -> Iterator[None]:
        # Once a backward pass: what an optimiser writes to in the middle of it has been read.
        current = torch._C._current_graph_task_id()
        if current != self._checked and self._weights.written() != self._written:
            raise RuntimeError(
                "checkpoint: a weight was written to, or an adapter added, deleted, fused or unfused, between plan.run "
                "and its backward pass, which computes activations again; do so after it"
            )
        self._checked = current
        with standing(self._module, self._adapters):
            yield
