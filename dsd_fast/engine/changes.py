"""What was changed in a network and neither its weights nor its config tell: attributes, classes, hooks, methods.

A network is compared with what its library makes of its config, so that what a library keeps for itself does not count,
nor another version of it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import lru_cache, partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsd_fast.jobs import tensors_hash
from dsd_fast.models.tuners import is_wrapper
from dsd_fast.unet.refusals import plain_processors
from dsd_fast.unet.shipped import home, of_library, told
from dsd_fast.unet.weights import HOOKS

# In the name of what another process may not have, or may have another of.
FLEETING = ("<lambda>", "<locals>", " at 0x")
# How deep objects are looked into.
_DEPTH = 6
_TORCHS = frozenset(vars(nn.Module()))
# What a library keeps for itself, or what costs other memory and gives the same answers.
_IDLE = frozenset({
    "_chunk_dim", "_chunk_size", "_gradient_checkpointing_func", "_internal_dict", "_old_forward", "config",
    "gradient_checkpointing", "hf_device_map", "name_or_path", "peft_config", "sliceable_head_dim", "use_slicing",
})  # fmt: skip
# Whose wrappers move tensors or compile, and nothing else.
_WRAPPERS = ("accelerate.", "torch._dynamo.")


def changes(network: Any) -> dict[str, Any]:
    """Tell what of a network is other than what its library makes of its config, by path, as JSON.

    Adapters, devices and types do not count, nor do dropouts while they do nothing.

    Raises:
        ValueError: a function, a class or a hook that another process could not tell from another.
    """
    # A class of one's own that is a module and no more has none.
    stock = next((kind for kind in type(network).__mro__ if of_library(kind) and kind is not nn.Module), None)
    twin = {} if stock is None else _twin(stock, _Config(network.config))
    result: dict[str, Any] = {}
    kinds: set[type] = set()
    for path, module in _modules(network, ""):
        kinds.update(type(module).__mro__)
        differing = _of_module(path or type(network).__name__, module, twin.get(path))
        if differing:
            result[path] = differing
    result |= dict.fromkeys(twin.keys() - dict(_modules(network, "")).keys())
    methods = {name: method for kind in kinds if of_library(kind) for name, method in _of_class(kind)}
    if methods:
        result["methods"] = methods
    return result


class _Config:
    """A network's config as the key of what is made of it."""

    def __init__(self, config: Any) -> None:
        self.config = config
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        self._text = json.dumps(values, sort_keys=True, default=str)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=16)
def _twin(stock: Any, config: _Config) -> dict[str, nn.Module]:
    """The modules, by path, of a network without weights."""
    own = copy.deepcopy(config.config)
    with torch.device("meta"):
        network = stock.from_config(own) if hasattr(stock, "from_config") else stock(own)
    return dict(network.eval().named_modules())


def _modules(module: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All modules by the paths that they have without adapters, whose layers are left out."""
    inside = "base_layer" if hasattr(module, "get_base_layer") else "original_module" if is_wrapper(module) else None
    if inside is not None:
        yield from _modules(module._modules[inside], path)
        return
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{path}.{name}" if path else name)


def _of_module(path: str, module: Any, twin: Any) -> dict[str, Any]:
    kind, own = type(module), vars(module)
    shipped = vars(twin) if twin is not None and isinstance(module, type(twin)) else {}
    foreign = not of_library(kind)
    result: dict[str, Any] = {}
    if twin is None or kind is not type(twin):
        result["class"] = _name(path, kind)
    dropping = module.training and (foreign or any(own[key] for key in own if _of_dropout(key, own[key])))
    if dropping:
        result["training"] = True
    for key in sorted((own.keys() | shipped.keys()) - _TORCHS - _IDLE):
        value, before = own.get(key), shipped.get(key)
        if value is before or (_of_dropout(key, value) and not dropping):
            continue
        if key not in shipped and not foreign:
            # What a library's class was given besides, it reads only in place of a method, or as a setting.
            replaces = callable(getattr(kind, key, None)) or key == "_hf_hook"
            if not replaces and (key.startswith("_") or not isinstance(value, bool | int | float | str)):
                continue
            if replaces and (home(value).startswith(_WRAPPERS) or _is_own(value, module, key)):
                continue
        now = _json(f"{path}.{key}", value)
        if now != _json(f"{path}.{key}", before):
            result[key] = now
    for name in HOOKS:
        hooks = [_json(f"{path}: a hook", hook) for hook in own[name].values() if not of_library(hook)]
        if hooks:
            result[name] = hooks
    return result


def _is_own(value: Any, module: Any, key: str) -> bool:
    """Whether a method that was put on a module is its class's, as one that was put back is."""
    return isinstance(value, MethodType) and value == getattr(type(module), key).__get__(module)


def _of_class(kind: type) -> Iterator[tuple[str, Any]]:
    """The methods of a library's class that are none of a library, each with the name of what is there."""
    for name, value in vars(kind).items():
        level = value
        while isinstance(level, FunctionType | MethodType | partial):
            if not of_library(level) and home(level) != "contextlib":
                where = f"{told(kind)}.{name}"
                yield where, _callable(where, level, _DEPTH)
                break
            level = getattr(level, "__wrapped__", None)


def _of_dropout(key: str, value: Any) -> bool:
    return (key == "p" or "drop" in key) and isinstance(value, int | float)


def _json(path: str, value: Any, depth: int = _DEPTH) -> Any:
    """A value as JSON that is equal wherever it does the same."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return "meta" if value.is_meta else tensors_hash({"": value})
    if isinstance(value, np.generic | np.ndarray):
        return tensors_hash({"": torch.from_numpy(np.array(value))})
    if depth == 0:
        if not of_library(value):
            raise ValueError(
                f"{path} holds {told(value)} too deep inside for a later run to tell it from another; expected "
                "numbers, text, tensors and plain objects of these"
            )
        return told(value)
    if isinstance(value, torch.dtype | torch.device):
        return None
    if isinstance(value, Mapping):
        return {str(key): _json(path, value[key], depth - 1) for key in value}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_json(path, item, depth - 1) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    if isinstance(value, Enum | bytes):
        return str(value)
    if callable(value) and not isinstance(value, nn.Module):
        if type(value) in plain_processors():
            return "plain attention"
        return _callable(path, value, depth)
    if isinstance(value, nn.Module):
        tensors = {**dict(value.named_parameters()), **dict(value.named_buffers())}
        return [_name(path, type(value)), repr(value), tensors_hash(tensors)]
    return {_name(path, type(value)): _json(path, _attributes(path, value), depth - 1)}


def _callable(path: str, value: Any, depth: int) -> Any:
    """A function's name, with what it is bound to: a partial's arguments, a method's object, an object's attributes."""
    name, bound = _name(path, value), []
    while isinstance(value, partial):
        bound += [_json(path, value.args, depth - 1), _json(path, value.keywords, depth - 1)]
        value = value.func
    if isinstance(value, MethodType):
        # A module of the network is compared itself.
        value = None if isinstance(value.__self__, nn.Module | type) else value.__self__
    if value is not None and not isinstance(value, FunctionType | BuiltinFunctionType | type):
        held = _json(path, _attributes(path, value), depth - 1)
        return {name: [*bound, held] if bound else held}
    return {name: bound} if bound else name


def _attributes(path: str, value: Any) -> Mapping[str, Any]:
    """What an object holds."""
    if not hasattr(value, "__dict__"):
        if of_library(value):
            return {}
        raise ValueError(f"{path} is or holds {told(value)}, whose state a later run could not tell from another")
    held: Mapping[str, Any] = vars(value)
    return held


def _name(what: str, value: Any) -> str:
    """The name of a function or class, or of an object's class, that a later process knows it by."""
    while isinstance(value, partial):
        value = value.func
    name = told(value)
    if any(mark in name for mark in FLEETING) and not of_library(value):
        raise ValueError(
            f"{what} is {name}, which a later run could not tell from another; expected a class or function of a "
            "module, or functools.partial of one"
        )
    return name
