"""A CUDA device that is not there: tensors that say "cuda:0", hold their numbers on the CPU, and tell each wait.

Inside :func:`pretended` a copy to the device that blocks, a read of a value from it, an index that has to be counted,
and an event with nothing queued behind it are noted as waits of the host. What is copied to the host without blocking
lies there only after an event that was recorded behind it has been waited for; until then the memory holds NaN.
Autograd runs through such tensors. An operator of the package is one launch: what it does inside is not looked at.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MEMORY = 1 << 33
# Pageable memory up to this is staged by the driver; above, a copy may wait for the stream (CUDA driver API,
# "API synchronization behavior").
STAGED = 64 << 10

READS = {"_local_scalar_dense", "equal", "is_nonzero"}
COUNTS = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "_linalg_eigh"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
ROOT = Path(__file__).parents[1]


class OnDevice(Tensor):
    """A tensor that says "cuda:0"; ``inner`` holds its numbers."""

    # It stands for torch's own: a foreign type of weight would be refused.
    __module__ = "torch"
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CPU,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: OnDevice) -> None:
        if (value.shape, value.dtype) != (self.shape, self.dtype):
            raise NotImplementedError("numbers of another shape or type")
        self.inner = value.inner

    def __repr__(self) -> str:
        return f"on the device: {self.inner}"

    def numpy(self) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    # Not the mode's business alone: it is one thread's.
    def to(self, *args: Any, **kwargs: Any) -> Any:
        return _moved("to", Tensor.to, (self, *args), kwargs)

    def cpu(self) -> Any:
        return _moved("cpu", Tensor.cpu, (self,), {})

    def tolist(self) -> Any:
        _now().wait("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _now().dispatch(function, args, kwargs or {})


class Device:
    """What happened: ``waits`` counts (file, function: what), ``behind`` those for an event with work queued behind."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.behind: Counter[str] = Counter()
        self.launches = 0
        self._copies: list[tuple[Tensor, Tensor]] = []
        # Kept alive, so that no other storage gets the address.
        self._pinned: dict[int, Tensor] = {}

    def wait(self, what: str) -> None:
        self.waits[f"{_caller()}: {what}"] += 1

    def arrived(self, copies: int) -> None:
        """The first copies to the host are done."""
        for target, value in self._copies[:copies]:
            target.copy_(value)
        self._copies[:copies] = [(target[:0], value[:0]) for target, value in self._copies[:copies] if target.ndim]

    def pinned(self, value: Tensor) -> bool:
        return value.untyped_storage().data_ptr() in self._pinned

    def pin(self, value: Tensor) -> Tensor:
        self._pinned[value.untyped_storage().data_ptr()] = value
        return value

    def dispatch(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator of aten, or of the package, with tensors of the device among its arguments."""
        name = function.overloadpacket.__name__
        leaves = [*_leaves(args), *_leaves(kwargs.values())]
        self.launches += 1
        if name in READS or name in COUNTS:
            self.wait(name)
        if name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            return self._copy(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if name in INDEXING:
            for index in _leaves(args[1]):
                if isinstance(index, Tensor) and not isinstance(index, OnDevice):
                    self.wait("an index in host memory")
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.wait("a mask as an index")
        elif any(isinstance(x, Tensor) and not isinstance(x, OnDevice) and x.ndim for x in leaves):
            raise RuntimeError(f"{_caller()}: {function} of tensors on {CUDA} and on the CPU")
        results = function(*map(_inner, args), **{key: _inner(value) for key, value in kwargs.items()})
        if name in READS:
            return results
        if isinstance(results, Tensor):
            return _known(results, leaves)
        if isinstance(results, list | tuple):
            return type(results)(_known(x, leaves) if isinstance(x, Tensor) else x for x in results)
        return results

    def upload(self, value: Tensor, *, blocking: bool) -> None:
        """Note how a tensor comes to the device."""
        if value.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("a copy to the device that a gradient goes through")
        self.launches += 1
        if blocking:
            self.wait("a copy to the device that blocks")
        elif value.nbytes > STAGED and not self.pinned(value):
            self.wait("a copy to the device from pageable memory")

    def _copy(self, target: Tensor, value: Tensor, non_blocking: bool) -> Tensor:
        if isinstance(target, OnDevice):
            self.upload(value, blocking=not non_blocking)
            target.inner.copy_(value)
        elif non_blocking and self.pinned(target):
            self._copies.append((target, value.inner.clone()))
            target.fill_(float("nan") if target.is_floating_point() else True)
        else:
            self.wait("a copy to the host")
            target.copy_(value.inner)
        return target


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.record()

    def record(self, *_: Any) -> None:
        self._launches, self._copies = _now().launches, len(_now()._copies)

    def wait(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        device = _now()
        if device.launches == self._launches:
            device.wait("an event with nothing behind it")
        else:
            device.behind[_caller()] += 1
        device.arrived(self._copies)


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def wait_event(self, _: Any) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def synchronize(self) -> None:
        _now().wait("a stream")


class _Calls(TorchFunctionMode):
    """What names a device, or asks for pinned memory: torch itself would look for CUDA."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name in ("to", "cpu", "cuda", "type_as"):
            return _moved(name, function, args, kwargs)
        if name == "is_pinned":
            return not isinstance(args[0], OnDevice) and _now().pinned(args[0])
        if name == "pin_memory":
            return args[0] if _now().pinned(args[0]) else _now().pin(args[0].clone())
        pinned, device = kwargs.pop("pin_memory", False), kwargs.get("device")
        if pinned:
            return _now().pin(function(*map(_inner, args), **kwargs))
        if device is None or torch.device(device).type != "cuda":
            return function(*args, **kwargs)
        kwargs["device"] = CPU
        if name in ("tensor", "as_tensor", "asarray"):
            if isinstance(args[0], OnDevice):
                return args[0]
            result = function(*args, **kwargs)
            _now().upload(result, blocking=True)
            return OnDevice(result.clone())
        _now().launches += 1
        result = function(*map(_inner, args), **kwargs)
        return OnDevice(result.detach()).requires_grad_(result.requires_grad)


def _moved(name: str, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`Tensor.to` and its kin."""
    value, *rest = args
    given = [*rest, *kwargs.values()]
    dtype = next((x for x in given if isinstance(x, torch.dtype)), None)
    device = next((torch.device(x) for x in given if isinstance(x, str | torch.device)), None)
    other = next((x for x in given if isinstance(x, Tensor)), None)
    if other is not None:
        dtype, device = other.dtype, other.device
    device = {"cpu": CPU, "cuda": CUDA}.get(name, device)
    there = isinstance(value, OnDevice)
    left = {key: x for key, x in kwargs.items() if key in ("memory_format", "copy")}
    if there and device is not None and device.type == "cpu":
        # Without blocking it would be read before it is there.
        waits = not kwargs.get("non_blocking", False)
        _now().wait("a copy to the host" if waits else "a copy to the host that nobody waits for")
        return value.inner.to(dtype or value.dtype, copy=True)
    if not there and device is not None and device.type == "cuda":
        _now().upload(value, blocking=not kwargs.get("non_blocking", False))
        return OnDevice(value.to(dtype or value.dtype, **{**left, "copy": True}))
    if there or other is not None:
        changes = (dtype or value.dtype) != value.dtype or left.get("memory_format") or left.get("copy")
        left.pop("copy", None)
        return torch.ops.aten._to_copy(value, dtype=dtype, **left) if changes else value
    return function(*args, **kwargs)


_devices: list[Device] = []


def _now() -> Device:
    return _devices[-1]


@contextmanager
def pretended() -> Iterator[Device]:
    """Inside the ``with`` block there is the device."""
    device, properties = Device(), {"total_memory": MEMORY, "multi_processor_count": 132, "name": "none"}
    cuda: dict[str, Any] = {
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": lambda *_: _Stream(),
        "stream": lambda _: nullcontext(),
        "device": lambda _: nullcontext(),
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "is_available": lambda: True,
        "synchronize": lambda *_: device.wait("the device"),
        "mem_get_info": lambda *_: (MEMORY, MEMORY),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "memory_stats": lambda *_: {},
        "empty_cache": lambda: None,
        "get_device_properties": lambda *_: type("Properties", (), properties),
    }
    _devices.append(device)
    # A parameter of the host cannot become one of the device by its numbers alone.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    grouped = torch._C._group_tensors_by_device_and_dtype
    try:
        with (
            patch.multiple(torch.cuda, **cuda),
            patch.object(torch._C, "_group_tensors_by_device_and_dtype", lambda *given: _regrouped(grouped(*given))),
            _Calls(),
        ):
            yield device
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        _devices.pop()


def _regrouped(groups: Any) -> Any:
    """What optimisers and clipping see of tensors: C++ would tell the device that holds their numbers."""
    return {(lists[0][0].device, dtype): (lists, places) for (_, dtype), (lists, places) in groups.items()}


def to_device(value: Any) -> Any:
    """A tensor, or a module's own parameters and buffers, on the device."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    moved = nn.Parameter(OnDevice(parameter.detach()), requires_grad=parameter.requires_grad)
                    module._parameters[name] = moved
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = OnDevice(buffer)
        return value
    return OnDevice(value)


def _inner(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_inner, value))
    return value.inner if isinstance(value, OnDevice) else value


def _known(result: Tensor, arguments: list[Any]) -> OnDevice:
    """The argument that was written to, or a new tensor."""
    for value in arguments:
        if isinstance(value, OnDevice) and value.inner is result:
            return value
    return OnDevice(result)


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _caller() -> str:
    """The innermost function of the package that is running, transfers aside, else of a test."""
    frame = sys._getframe(1)
    named = "?"
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and not path.is_relative_to(ROOT / ".venv"):
            name = f"{path.relative_to(ROOT)} {frame.f_code.co_qualname}"
            if not name.startswith(("tests/", "dsd_fast/kernels/common/transfer", "kernels/common/transfer")):
                return name.removeprefix("dsd_fast/")
            named = name if named == "?" else named
        frame = frame.f_back
    return named
