"""Whether a network still has the weights it had, and no hooks, at a price that every call can pay."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import chain, repeat
from operator import contains
from typing import Any

from torch import Tensor, nn

from dsd_fast.models.tuners import kinds, strengths_of
from dsd_fast.unet.adapters import version

# What is computed from weights as parameters where nothing else is done.
_WEIGHTED = frozenset({nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm})
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def untouched(module: Any) -> bool:
    """Whether a module has no hook, and no forward of its own."""
    # Written out, because every call of a layer asks.
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


class Weights:
    """Watches the modules and parameters of a network.

    The tree is walked once, and again when a module in it was replaced, as loading an adapter does.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._tree: list[Any] | None = None

    def signature(self) -> Hashable:
        """Equal while the same modules compute with weights at the same addresses and equally set adapters."""
        self._follow()
        adapters = tuple(
            (
                layer.disable_adapters,
                tuple(layer.active_adapters),
                tuple(layer.merged_adapters),
                tuple(tuple(numbers.items()) for numbers in strengths_of(layer).values()),
            )
            for layer in self._adapted
        )
        assert self._tree is not None
        addresses = tuple(tensor.data_ptr() for tensor in self._tensors(buffers=True))
        return tuple(self._tree), addresses, adapters, self._network.training

    def written(self) -> Hashable:
        """Equal while the same weights are there, none was written to, and the same adapters are merged into them."""
        self._follow()
        return [version(p) for p in self._tensors()], [tuple(layer.merged_adapters) for layer in self._adapted]

    def hooked(self) -> bool:
        """Whether a module has a hook or a forward of its own, which compiled work would not see come and go."""
        self._follow()
        return any(self._hooks) or any(map(contains, self._own, repeat("forward")))

    def plain(self) -> bool:
        """Whether nothing is put on any module that its class's own forward would not know of."""
        return (
            not self.hooked()
            and not any(map(contains, self._own, repeat("_conv_forward")))
            # A weight taken out, to be made anew at each call.
            and self._whole
            and sum(map(len, self._parameters)) == self._count
        )

    def trained(self) -> bool:
        """Whether a weight wants a gradient; of the network that :meth:`signature` saw last."""
        return any(p.requires_grad for p in self._tensors())

    def _follow(self) -> None:
        if self._tree is None or self._children() != self._tree:
            self._walk()

    def _walk(self) -> None:
        modules = list(self._network.modules())
        self._parents = [module._modules for module in modules if module._modules]
        # Adapters of some kinds are entries of dictionaries, which are empty before the first.
        self._parameters = [m._parameters for m in modules if m._parameters or isinstance(m, nn.ParameterDict)]
        self._count = sum(map(len, self._parameters))
        self._whole = all({"weight", "bias"} <= m._parameters.keys() for m in modules if type(m) in _WEIGHTED)
        self._buffers = [module._buffers for module in modules if module._buffers]
        self._hooks = [getattr(module, name) for module in modules for name in HOOKS]
        self._own = [module.__dict__ for module in modules]
        sought = kinds()
        self._adapted: list[Any] = [module for module in modules if isinstance(module, sought)]
        self._tree = self._children()

    def _children(self) -> list[Any]:
        # The modules, not their ids, which others would be given once these are gone.
        return list(chain.from_iterable([children.values() for children in self._parents]))

    def _tensors(self, buffers: bool = False) -> Iterator[Tensor]:
        held = chain(self._parameters, self._buffers) if buffers else self._parameters
        return (p for tensors in held for p in tensors.values() if p is not None)
