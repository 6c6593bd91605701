"""PEFT's layers in a network: which there are, how they stand, and who computes with them as what.

How adapters stand is the network's, not a call's. So a request that wants them otherwise has the network for itself
while it computes, and requests that want the same compute side by side: see :func:`standing`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from dsd_fast.kernels.common.library import traced


class LayerSetting(NamedTuple):
    """How a layer stands: its active adapters, whether they are disabled, and strengths by attribute and adapter."""

    layer: Any
    active: str | list[str]
    disabled: bool
    strengths: Mapping[str, Mapping[str, float]]


Setting = Sequence[LayerSetting]


def kinds() -> tuple[type, ...]:
    """What PEFT puts in the place of modules: layers with adapters, and wrappers of modules that adapters replace."""
    return _kinds() if "peft" in sys.modules else ()


# Every call of a plan asks, once for each layer whose keys it reads.
@functools.cache
def _kinds() -> tuple[type, ...]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def is_wrapper(layer: Any) -> bool:
    """Whether one adapter at most replaces the whole module, such as those of ``modules_to_save``."""
    return isinstance(layer, kinds()[1:])


def tuner_layers(network: Any) -> list[tuple[str, Any]]:
    """Path and layer of all that PEFT put into a network, whatever kind of adapter it holds."""
    if not isinstance(network, torch.nn.Module):
        return []
    if traced():
        return _Network().layers(network)
    with _CHANGE:
        return _of(network).layers(network)


def adapter_names(network: Any) -> set[str]:
    """The names of the adapters a network has."""
    names = set(getattr(network, "peft_config", None) or {})
    return names.union(*(layer._get_available_adapters() for _, layer in tuner_layers(network)))


def strengths_of(layer: Any) -> dict[str, dict[str, float]]:
    """The numbers that adapters are multiplied by, by attribute; most kinds have one ``scaling``, some have none."""
    attributes = dict.fromkeys(("scaling", *(name for name in layer.other_param_names if name.endswith("_scaling"))))
    # Not getattr: a wrapper hands the question on to what it wraps.
    return {name: held for name in attributes if isinstance(held := vars(layer).get(name), dict)}


def setting(network: Any) -> Setting:
    """How a network's adapters stand now."""
    return [_setting(layer) for _, layer in tuner_layers(network)]


def put(layers: Setting) -> None:
    """Set layers from now on."""
    for layer, active, disabled, strengths in layers:
        # Not layer.set_adapter(): that also changes which parameters are trainable.
        layer._active_adapter = active
        layer._disable_adapters = disabled
        for name, numbers in strengths.items():
            vars(layer)[name].update(numbers)


@contextmanager
def standing(network: Any, wanted: Setting | None = None) -> Iterator[None]:
    """Inside the ``with`` block a network's adapters stand as ``wanted``, and none of another thread's calls sees it.

    It waits until no other thread computes with the network as something else. Those that want the same go on together.
    Blocks may be nested, in networks and settings of any order: a thread that waits holds nothing.

    Args:
        wanted: None leaves the adapters as they stand, in an enclosing block as that has them.
    """
    if not isinstance(network, torch.nn.Module):
        # What stands for a text encoder that was let go.
        yield
        return
    if traced():
        # Traced code is one thread's, and a lock cannot be traced.
        before = [] if wanted is None else [_setting(each.layer) for each in wanted]
        put(wanted or ())
        try:
            yield
        finally:
            put(before)
        return
    caller, entry = _caller(), {network: wanted}
    with _CHANGE:
        new = not caller.entries
        caller.entries.append(entry)
        try:
            _settle(caller, new)
        except BaseException:
            _leave(caller, entry)
            raise
    try:
        yield
    finally:
        with _CHANGE:
            _leave(caller, entry)
            _settle(caller)


def own_backward() -> None:
    """Let blocks in the backward passes that this thread begins be the thread's, wherever torch runs them.

    It waits for those passes, perhaps in a block of its own: they must not wait for it.
    """
    if not torch._C._is_key_in_tls(_CALLER):
        caller = _caller()
        count = sys.getrefcount(caller)
        torch._C._stash_obj_in_tls(_CALLER, caller)
        if sys.getrefcount(caller) == count:
            # As torch 2.11 does: it lets go of a reference in the end that it did not count.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(caller))


# Held for moments: to read or change who computes with what, and to set layers.
_CHANGE = threading.Condition(threading.RLock())
# A request that could join others waits so many seconds for those that came before it. Not forever: what it joins may
# wait for it.
_PATIENCE = 1.0
_THREAD = threading.local()
# Of torch's own variables of a thread, which it hands to those that run its backward passes.
_CALLER = "dsd_fast.models.tuners"


class _Caller:
    """A thread, and the threads in which torch runs its backward passes."""

    def __init__(self) -> None:
        self.entries: list[dict[Any, Setting | None]] = []

    def wanted(self) -> dict[Any, Setting | None]:
        """Each network, and as what the innermost block that says so wants it."""
        result: dict[Any, Setting | None] = {}
        for network, setting in chain.from_iterable(entry.items() for entry in self.entries):
            result[network] = result.get(network) if setting is None else setting
        return result


class _Network:
    """Who computes with a network now, and how its layers stand outside of all calls where they are set otherwise."""

    def __init__(self) -> None:
        self.callers: set[_Caller] = set()
        self.own: Setting = ()
        self._tree: list[Any] | None = None

    def layers(self, network: Any) -> list[tuple[str, Any]]:
        """The tree is walked once, and again when a module in it was replaced, as the first adapter does."""
        if self._tree is None or self._children() != self._tree:
            sought, named = kinds(), list(network.named_modules())
            self._parents = [module._modules for _, module in named if module._modules]
            self._layers = [(path, module) for path, module in named if isinstance(module, sought)]
            self._tree = self._children()
        return self._layers

    def _children(self) -> list[Any]:
        return list(chain.from_iterable([children.values() for children in self._parents]))

    def free(self, caller: _Caller, wanted: Setting | None) -> bool:
        """Whether the caller may compute with it: alone, or as those who do."""
        if self.callers <= {caller}:
            return True
        return not self.own if wanted is None else all(map(_stands, wanted))

    def set(self, wanted: Setting | None) -> None:
        """Let layers stand as wanted; None: as outside of all calls."""
        if wanted is not None and all(map(_stands, wanted)):
            return
        put(self.own)
        self.own = ()
        # Most often all stand as they shall, and writing to a module is slow.
        changed = [each for each in wanted or () if not _stands(each)]
        self.own = [_setting(each.layer) for each in changed]
        put(changed)


_NETWORKS: WeakKeyDictionary[Any, _Network] = WeakKeyDictionary()
# Callers that wait for their first block, in the order in which they came.
_LINE: list[_Caller] = []


def _of(network: Any) -> _Network:
    return _NETWORKS.setdefault(network, _Network())


def _caller() -> _Caller:
    caller: _Caller | None = getattr(_THREAD, "caller", None)
    if torch._C._is_key_in_tls(_CALLER):
        caller = torch._C._get_obj_in_tls(_CALLER)
    if caller is None:
        caller = _THREAD.caller = _Caller()
    return caller


def _settle(caller: _Caller, new: bool = False) -> None:
    """Wait until all networks of the caller can stand as it wants them, let them, and let it go on.

    Args:
        new: whether it had no block before, so that those who wait already come first.
    """
    wanted = caller.wanted()
    networks = [(_of(network), setting) for network, setting in wanted.items()]
    until = time.monotonic() + _PATIENCE
    if new:
        _LINE.append(caller)
    try:
        while True:
            free = all(network.free(caller, setting) for network, setting in networks)
            left = until - time.monotonic()
            before = _LINE[: _LINE.index(caller)] if new and left > 0 else ()
            if free and not any(wanted.keys() & other.wanted().keys() for other in before):
                break
            for network, _ in networks:
                network.callers.discard(caller)
            _CHANGE.notify_all()
            _CHANGE.wait(left if free else None)
    finally:
        if new:
            _LINE.remove(caller)
            _CHANGE.notify_all()
    for network, setting in networks:
        network.callers.add(caller)
        network.set(setting)


def _leave(caller: _Caller, entry: dict[Any, Setting | None]) -> None:
    """End a block: networks that the caller has in no other one stand as before, once nobody computes with them."""
    # By identity: blocks may end in another order than they began, and two may want the same.
    caller.entries[:] = [other for other in caller.entries if other is not entry]
    for network in entry.keys() - caller.wanted().keys():
        _of(network).callers.discard(caller)
        if not _of(network).callers:
            _of(network).set(None)
    _CHANGE.notify_all()


def _setting(layer: Any) -> LayerSetting:
    strengths = {name: dict(numbers) for name, numbers in strengths_of(layer).items()}
    return LayerSetting(layer, layer._active_adapter, layer._disable_adapters, strengths)


def _stands(wanted: LayerSetting) -> bool:
    layer = wanted.layer
    if wanted.disabled or layer._disable_adapters:
        return bool(wanted.disabled and layer._disable_adapters)
    if _listed(wanted.active) != _listed(layer._active_adapter):
        return False
    held = vars(layer)
    return all(held[key].get(name) == value for key, own in wanted.strengths.items() for name, value in own.items())


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _alone() -> None:
    """In a forked process: of the threads there is only the one that forked."""
    for network in list(_NETWORKS.values()):
        network.callers &= {_caller()}
        if not network.callers:
            network.set(None)
    _LINE.clear()
    _CHANGE.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_CHANGE.acquire, after_in_parent=_CHANGE.release, after_in_child=_alone)
