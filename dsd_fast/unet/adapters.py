"""Adapters (LoRA through PEFT) that belong to a plan and are active only during its calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Signature = tuple[Any, ...]


class AdapterScope:
    """Switches a network to the adapters of one plan and back.

    Args:
        unet: the network.
        names: None leaves the network as it stands at each call; otherwise exactly these adapters are active, and an
            empty sequence means none.

    Raises:
        ValueError: an adapter the network does not have, or adapters fused into its weights.
    """

    def __init__(self, unet: Any, names: str | Sequence[str] | None) -> None:
        self._unet = unet
        self.names = None if names is None else (names,) if isinstance(names, str) else tuple(names)
        self._depth = 0
        if self.names is None:
            return
        known = set(getattr(unet, "peft_config", {}))
        for name in self.names:
            if name not in known:
                raise ValueError(
                    f"adapter: the network has no adapter {name!r}; it has {', '.join(sorted(known)) or 'none'}"
                )

    @contextmanager
    def active(self) -> Iterator[None]:
        """The plan's adapters inside the ``with`` block, the network's own again after it, whatever happens."""
        if self.names is None or self._depth:
            yield
            return
        layers = list(_tuner_layers(self._unet))
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
        fused = sorted({name for layer in layers for name in layer.merged_adapters})
        if fused:
            raise ValueError(f"adapter: {', '.join(fused)} is fused into the weights; call unfuse_lora() first")
        self._depth += 1
        try:
            # Not layer.set_adapter(): that also changes which parameters are trainable.
            for layer in layers:
                layer._active_adapter = list(self.names)
                layer._disable_adapters = not self.names
            yield
        finally:
            self._depth -= 1
            for layer, adapter, disabled in before:
                layer._active_adapter = adapter
                layer._disable_adapters = disabled


def signature(modules: Sequence[Any]) -> Signature:
    """What adapters do to ``modules`` now: equal signatures mean equally adapted layers."""
    result: list[Signature] = []
    for module in modules:
        merged: Signature = ()
        active: Signature = ()
        if hasattr(module, "lora_A"):
            merged = tuple(module.merged_adapters)
            if not module.disable_adapters:
                active = tuple((name, module.scaling[name]) for name in module.active_adapters if name in module.lora_A)
        result.append((merged, active))
    return tuple(result)


def _tuner_layers(unet: Any) -> Iterator[Any]:
    if not getattr(unet, "peft_config", None):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            yield module
