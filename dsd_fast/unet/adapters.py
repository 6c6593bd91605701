"""Adapters (LoRA through PEFT) that belong to a plan and are active only during its calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

Signature = tuple[Any, ...]
# An adapted layer, its active adapters, whether they are disabled, strengths.
LayerSetting = tuple[Any, str | list[str], bool, dict[str, float]]
Setting = list[LayerSetting]


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

    @property
    def identity(self) -> Signature:
        """Equal for scopes of one network that make the same adapters active, equally strong."""
        return self.names, tuple(tuple(sorted(each.items())) for each in self._scaling.values())

    @contextmanager
    def active(self) -> Iterator[None]:
        """The chosen adapters inside the ``with`` block, the network's own again after it, whatever happens.

        Raises:
            ValueError: an adapter is fused into the weights, so that it cannot be switched.
        """
        if self.names is None:
            yield
            return
        layers = _unfused_layers(self._network)
        names = self.names
        with under([(layer, list(names), not names, self._scaling.get(layer, {})) for layer in layers]):
            yield


def setting(network: Any) -> Setting:
    """How a network's adapters are set now."""
    return [_setting(layer) for layer in _tuner_layers(network)]


@contextmanager
def under(wanted: Setting) -> Iterator[None]:
    """Adapters set as they were or shall be inside the ``with`` block, and as they are after it, whatever happens."""
    before = [_setting(layer) for layer, *_ in wanted]
    # Most often all stand as they shall, and writing to a module is slow.
    changed = [(given, now) for given, now in zip(wanted, before, strict=True) if given != now]
    try:
        for given, _ in changed:
            _put(*given)
        yield
    finally:
        for _, now in changed:
            _put(*now)


def active_names(network: Any) -> tuple[str, ...]:
    """The adapters active on a network, in order; what single layers have besides is not told apart."""
    layers = [layer for layer in _tuner_layers(network) if not layer.disable_adapters]
    return tuple(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def active_strengths(network: Any) -> list[tuple[str, float]]:
    """The active adapters and, of the first layer that has it, the strength of each."""
    found: dict[str, float] = {}
    for layer in _tuner_layers(network):
        if not layer.disable_adapters:
            for name in layer.active_adapters:
                if name in layer.scaling:
                    found.setdefault(name, float(layer.scaling[name]))
    return list(found.items())


def adapter_strengths(*networks: Any) -> Signature:
    """The strengths of all adapters of networks, layer by layer, active or not."""
    return tuple(tuple(sorted(layer.scaling.items())) for network in networks for layer in _tuner_layers(network))


def strengths_by_layer(network: Any) -> dict[str, list[tuple[str, float]]]:
    """Path of each layer → the adapters that act there now, in order, and the strength of each.

    Layers where none acts are left out, and so is what is fused into the weights.
    """
    found = {}
    for path, layer in _named_tuner_layers(network):
        if not layer.disable_adapters and not layer.merged:
            found[path] = [
                (name, float(layer.scaling[name])) for name in layer.active_adapters if name in layer.scaling
            ]
    return {path: strengths for path, strengths in found.items() if strengths}


def strengths_summary(layers: Mapping[str, Sequence[tuple[str, float]]]) -> dict[str, list[float]]:
    """Adapter → its different strengths, ascending, of what :func:`strengths_by_layer` says."""
    found: dict[str, set[float]] = {}
    for strengths in layers.values():
        for name, strength in strengths:
            found.setdefault(name, set()).add(strength)
    return {name: sorted(each) for name, each in found.items()}


def acting_tensors(network: Any) -> Iterator[tuple[str, Any]]:
    """The parameters and buffers that count now, by the names that they have without adapters.

    Those of adapters that do not act are left out: a network that has such adapters gives what it gave without them.
    """
    layers = {path for path, _ in _named_tuner_layers(network)}
    acting = strengths_by_layer(network)
    named = (network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False))
    for name, tensor in chain(*named):
        # As "to_q.lora_A.<adapter>.weight" and "to_q.base_layer.weight", where it was "to_q.weight".
        path, _, rest = name.partition(".lora_")
        if path in layers and rest.split(".")[1] not in dict(acting.get(path, ())):
            continue
        path, _, rest = name.partition(".base_layer.")
        yield f"{path}.{rest}" if path in layers else name, tensor


def activate(network: Any, names: Sequence[str]) -> None:
    """From now on exactly these adapters are active, at the strength they have.

    Raises:
        ValueError: an adapter is fused into the weights, so that it cannot be switched.
    """
    for layer in _unfused_layers(network):
        _put(layer, list(names), not names, {})


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


def _setting(layer: Any) -> LayerSetting:
    return layer, layer._active_adapter, layer._disable_adapters, dict(layer.scaling)


def _put(layer: Any, adapter: str | list[str], disabled: bool, scaling: Mapping[str, float]) -> None:
    # Not layer.set_adapter(): that also changes which parameters are trainable.
    layer._active_adapter = adapter
    layer._disable_adapters = disabled
    layer.scaling.update(scaling)


def _unfused_layers(network: Any) -> list[Any]:
    layers = list(_tuner_layers(network))
    fused = sorted({name for layer in layers for name in layer.merged_adapters})
    if fused:
        raise ValueError(f"adapter: {', '.join(fused)} is fused into the weights; call unfuse_lora() first")
    return layers


def _tuner_layers(network: Any) -> Iterator[Any]:
    return (layer for _, layer in _named_tuner_layers(network))


def _named_tuner_layers(network: Any) -> Iterator[tuple[str, Any]]:
    if not adapter_names(network):
        return
    from peft.tuners.lora import LoraLayer

    for path, module in network.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module
