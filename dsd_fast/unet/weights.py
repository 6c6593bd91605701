"""Whether a network still has the weights it had, at a price that every call can pay."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor


class Weights:
    """Watches the modules and parameters of a network.

    The tree is walked once, and again when a module in it was replaced, as loading an adapter does.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._tree: list[int] | None = None

    def signature(self) -> Hashable:
        """Equal while the same modules compute with weights at the same addresses and equally set adapters."""
        if self._tree is None or self._children() != self._tree:
            self._walk()
        adapters = tuple(
            (
                layer.disable_adapters,
                tuple(layer.active_adapters),
                tuple(layer.merged_adapters),
                tuple(layer.scaling.items()),
            )
            for layer in self._adapted
        )
        assert self._tree is not None
        return tuple(self._tree), tuple(p.data_ptr() for p in self._tensors()), adapters, self._network.training

    def trained(self) -> bool:
        """Whether a weight wants a gradient; of the network that :meth:`signature` saw last."""
        return any(p.requires_grad for p in self._tensors())

    def _walk(self) -> None:
        modules = list(self._network.modules())
        self._parents = [module._modules for module in modules if module._modules]
        self._parameters = [module._parameters for module in modules if module._parameters]
        self._adapted = [module for module in modules if hasattr(module, "lora_A")]
        self._tree = self._children()

    def _children(self) -> list[int]:
        return [id(child) for children in self._parents for child in children.values()]

    def _tensors(self) -> Iterator[Tensor]:
        return (p for parameters in self._parameters for p in parameters.values() if p is not None)
