"""Adapters (PEFT's, of every kind) that belong to a plan and are active only during its calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from dsd_fast.models.tuners import (
    LayerSetting,
    Setting,
    adapter_names,
    is_wrapper,
    kinds,
    put,
    standing,
    strengths_of,
    tuner_layers,
)

Signature = tuple[Any, ...]
# Ways to make a LoRA that take its matrices out of the weights.
_TAKEN_OUT = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
        self._strengths: dict[Any, dict[str, dict[str, float]]] = {}
        if not self.names:
            return
        known = adapter_names(network)
        for name in self.names:
            if name not in known:
                raise ValueError(
                    f"adapter: the network has no adapter {name!r}; it has {', '.join(sorted(known)) or 'none'}"
                )
        for _, layer in tuner_layers(network):
            self._strengths[layer] = {
                attribute: {name: numbers[name] for name in self.names if name in numbers}
                for attribute, numbers in strengths_of(layer).items()
            }

    @property
    def identity(self) -> Signature:
        """Equal for scopes of one network that make the same adapters active, equally strong."""
        strengths = (numbers for own in self._strengths.values() for numbers in own.values())
        return self.names, tuple(tuple(sorted(numbers.items())) for numbers in strengths)

    def active(self) -> AbstractContextManager[None]:
        """The chosen adapters inside the ``with`` block, the network's own again after it, whatever happens.

        Other threads' calls see nothing of it; see :func:`dsd_fast.models.tuners.standing`.

        Raises:
            ValueError: an adapter that cannot be switched: it is fused into the weights, or was taken out of them.
        """
        if self.names is None:
            return standing(self._network)
        return standing(self._network, _chosen(self._network, self.names, self._strengths))


def activate(network: Any, names: Sequence[str]) -> None:
    """From now on exactly these adapters are active, at the strength they have.

    Raises:
        ValueError: as :meth:`AdapterScope.active`.
    """
    put(_chosen(network, names, {}))


def active_names(network: Any) -> tuple[str, ...]:
    """The adapters active on a network, in order; what single layers have besides is not told apart."""
    layers = [layer for _, layer in tuner_layers(network) if not layer.disable_adapters]
    return tuple(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def acting(layer: Any) -> list[str]:
    """The adapters that count in a layer of PEFT's now, in order; of those fused into the weights none."""
    if layer.disable_adapters or layer.merged_adapters:
        return []
    own, active = layer._get_available_adapters(), layer.active_adapters
    if is_wrapper(layer):
        # It takes the first, and none where one is active that it does not have.
        return list(active[:1]) if own.issuperset(active) else []
    return [name for name in active if name in own]


def adapter_strengths(*networks: Any) -> Signature:
    """The strengths of all adapters of networks, layer by layer, active or not."""
    layers = (layer for network in networks for _, layer in tuner_layers(network))
    return tuple(tuple(sorted(numbers.items())) for layer in layers for numbers in strengths_of(layer).values())


def strengths_by_layer(network: Any) -> dict[str, list[tuple[str, float]]]:
    """Path of each adapted module → the adapters that act there now, in order, and the strength of each.

    An adapter of a kind without a strength has 1. Modules where none acts are left out, and so is what is fused into
    the weights.
    """
    found: dict[str, list[tuple[str, float]]] = {}
    for path, layer in tuner_layers(network):
        for name in acting(layer):
            numbers = (own[name] for own in strengths_of(layer).values() if name in own)
            found.setdefault(path.replace(".base_layer", ""), []).append((name, float(next(numbers, 1.0))))
    return found


def strengths_summary(layers: Mapping[str, Sequence[tuple[str, float]]]) -> dict[str, list[float]]:
    """Adapter → its different strengths, ascending, of what :func:`strengths_by_layer` says."""
    found: dict[str, set[float]] = {}
    for strengths in layers.values():
        for name, strength in strengths:
            found.setdefault(name, set()).add(strength)
    return {name: sorted(each) for name, each in found.items()}


def acting_tensors(network: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that count now, by the names that they have without adapters.

    Those of adapters that do not act are left out: a network that has such adapters gives what it gave without them.
    """
    return _acting_tensors(network, "", kinds())


def _acting_tensors(module: Any, prefix: str, layers: tuple[type, ...]) -> Iterator[tuple[str, Tensor]]:
    names = acting(module) if isinstance(module, layers) else None
    if names is None or names:
        yield from _tensors(module, prefix)
    for key, child in module._modules.items():
        if child is None:
            continue
        if names is None:
            yield from _acting_tensors(child, f"{prefix}{key}.", layers)
        elif hasattr(child, "keys"):
            # As "to_q.lora_A.<adapter>.weight".
            for name in names:
                yield from _entry(child, name, f"{prefix}{key}.{name}")
        else:
            # As "to_q.base_layer.weight", where it was "to_q.weight".
            yield from _acting_tensors(child, prefix, layers)


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """A module's own, those of its children aside."""
    for tensors in (module._parameters, module._buffers):
        yield from ((f"{prefix}{name}", tensor) for name, tensor in tensors.items() if tensor is not None)


def _entry(container: Any, name: str, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors that a dictionary of modules, parameters or buffers has of an adapter."""
    if name not in container:
        return
    held = container[name]
    if isinstance(held, Tensor):
        yield path, held
        return
    for key, module in held.named_modules(prefix=path):
        yield from _tensors(module, f"{key}.")


def stack(module: Any) -> Iterator[Any]:
    """The layers of PEFT's that stand around a module, from without: adapters of two kinds make two."""
    while isinstance(module, kinds()):
        layer: Any = module
        yield layer
        if not is_wrapper(layer):
            module = layer.get_submodule("base_layer")
        elif hasattr(layer, "modules_to_save") and (names := acting(layer)):
            module = layer.modules_to_save[names[0]]
        else:
            module = layer.original_module


def signature(modules: Sequence[Any]) -> Signature:
    """What adapters do to ``modules`` now: equal signatures mean equally adapted layers, down to the weights' state."""
    return tuple(
        tuple((tuple(layer.merged_adapters), tuple(_state(layer, name) for name in acting(layer))) for layer in layers)
        for layers in map(stack, modules)
    )


def version(tensor: Any) -> tuple[int, int]:
    """Identity and version of a tensor: another one, or a write to this one, changes it."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def _state(layer: Any, name: str) -> Signature:
    """An adapter's strength in a layer and the state of its weights: another file or an optimiser's step changes it."""
    strengths = tuple(numbers.get(name) for numbers in strengths_of(layer).values())
    containers = (child for child in layer._modules.values() if hasattr(child, "keys"))
    return name, strengths, tuple(version(tensor) for child in containers for _, tensor in _entry(child, name))


def _chosen(network: Any, names: Sequence[str], strengths: Mapping[Any, Mapping[str, Mapping[str, float]]]) -> Setting:
    """Exactly these adapters, as strong as is said."""
    layers = [layer for _, layer in tuner_layers(network)]
    fused = sorted({name for layer in layers for name in layer.merged_adapters})
    if fused:
        raise ValueError(f"adapter: {', '.join(fused)} is fused into the weights; call unfuse_lora() first")
    for name, config in (getattr(network, "peft_config", None) or {}).items():
        made = getattr(config, "init_lora_weights", None)
        if name not in names and isinstance(made, str) and made.startswith(_TAKEN_OUT):
            raise ValueError(
                f"adapter: {name!r} was made with init_lora_weights={made!r}, which takes it out of the weights, so "
                "that it cannot be switched off; name it, or convert it to a plain LoRA as PEFT's documents say"
            )
    return [_of_layer(layer, names, strengths.get(layer, {})) for layer in layers]


def _of_layer(layer: Any, names: Sequence[str], strengths: Mapping[str, Mapping[str, float]]) -> LayerSetting:
    own = layer._get_available_adapters()
    active = [name for name in names if name in own]
    if len(active) > 1 and is_wrapper(layer):
        raise ValueError(
            f"adapter: {' and '.join(map(repr, active))} each replace a whole module ({type(layer).__name__} around "
            f"{type(layer.original_module).__name__}), expected one of them"
        )
    return LayerSetting(layer, active, not active, strengths)
