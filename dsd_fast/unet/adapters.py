"""Adapters (LoRA through PEFT) that belong to a plan and are active only during its calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Signature = tuple[Any, ...]


class AdapterScope:
    """Switches a network to chosen adapters and back.

    Args:
        network: a UNet or text encoder.
        names: None leaves the network as it stands at each call; otherwise exactly these adapters are active, at the
            strength they have now, and an empty sequence means none.

    Raises:
        ValueError: an adapter the network does not have.
    """

    def __init__(self, network: Any, names: str | Sequence[str] | None) -> None:
        self._network = network
        self.names = None if names is None else (names,) if isinstance(names, str) else tuple(names)
        self._scaling: dict[Any, dict[str, float]] = {}
        if self.names is None:
            return
        known = adapter_names(network)
        for name in self.names:
            if name not in known:
                raise ValueError(
                    f"adapter: the network has no adapter {name!r}; it has {', '.join(sorted(known)) or 'none'}"
                )
        for layer in _tuner_layers(network):
            self._scaling[layer] = {name: layer.scaling[name] for name in self.names if name in layer.scaling}

    @contextmanager
    def active(self) -> Iterator[None]:
        """The chosen adapters inside the ``with`` block, the network's own again after it, whatever happens.

        Raises:
            ValueError: an adapter is fused into the weights, so that it cannot be switched.
        """
        if self.names is None:
            yield
            return
        layers = list(_tuner_layers(self._network))
        fused = sorted({name for layer in layers for name in layer.merged_adapters})
        if fused:
            raise ValueError(f"adapter: {', '.join(fused)} is fused into the weights; call unfuse_lora() first")
        before = [(layer, layer._active_adapter, layer._disable_adapters, dict(layer.scaling)) for layer in layers]
        try:
            # Not layer.set_adapter(): that also changes which parameters are trainable.
            for layer in layers:
                layer._active_adapter = list(self.names)
                layer._disable_adapters = not self.names
                layer.scaling.update(self._scaling.get(layer, {}))
            yield
        finally:
            for layer, adapter, disabled, scaling in before:
                layer._active_adapter = adapter
                layer._disable_adapters = disabled
                layer.scaling.update(scaling)


def adapter_names(network: Any) -> set[str]:
    """The names of the adapters a network has."""
    return set(getattr(network, "peft_config", None) or {})


def signature(modules: Sequence[Any]) -> Signature:
    """What adapters do to ``modules`` now: equal signatures mean equally adapted layers, down to the weights' state."""
    result: list[Signature] = []
    for module in modules:
        merged: Signature = ()
        active: Signature = ()
        if hasattr(module, "lora_A"):
            merged = tuple(module.merged_adapters)
            if not module.disable_adapters:
                names = [name for name in module.active_adapters if name in module.lora_A]
                active = tuple((name, module.scaling[name], *_state(module, name)) for name in names)
        result.append((merged, active))
    return tuple(result)


def version(tensor: Any) -> tuple[int, int]:
    """Identity and version of a tensor: another one, or a write to this one, changes it."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def _state(module: Any, name: str) -> Signature:
    """Identity and version of an adapter's weights: another file or an optimiser's step changes one of them."""
    return version(module.lora_A[name].weight), version(module.lora_B[name].weight)


def _tuner_layers(network: Any) -> Iterator[Any]:
    if not adapter_names(network):
        return
    from peft.tuners.lora import LoraLayer

    for module in network.modules():
        if isinstance(module, LoraLayer):
            yield module
