"""Interprets kernels under guard: every load and store is judged before it is made, and programs run in any order.

The interpreter computes with plain addresses, so the tensor that a pointer came from is lost. Under guard the upper 16
bits of an address, which no machine uses, number the argument that it started from. Whatever a kernel adds, its loads
and stores are held to this:

- The address is that of an element of the very tensor that was passed: not of another's memory, nor in a view's gaps.
- A launch stores to an element once at most, and loads none that it stores to, under whatever argument. What nobody
  writes twice or both reads and writes cannot depend on the order of programs, nor on that of a program's threads.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

ADDRESS_BITS = 48
ADDRESS = np.uint64((1 << ADDRESS_BITS) - 1)

LOADED, STORED = 1, 2


@dataclass
class Argument:
    """A tensor of a launch.

    Attributes:
        tensor: the argument.
        elements: of each place from its first element to its last, in units of an element: whether it has one there.
        begin: its first byte in the storage.
        marks: of each byte of the storage: whether an element that starts there was loaded or stored to.
    """

    tensor: torch.Tensor
    elements: np.ndarray
    begin: int
    marks: np.ndarray


class Guard:
    """What :func:`guarded` gives.

    Attributes:
        launched: the kernels, "dsd_fast.kernels.geglu.kernel.forward_kernel".
        kernel: the one that runs.
        orders: of each launch, the programs in the order in which they ran.
    """

    def __init__(self, seed: int | None) -> None:
        self.launched: set[str] = set()
        self.orders: list[list[int]] = []
        self._random = None if seed is None else random.Random(seed)
        self.kernel = ""
        self._arguments: list[Argument] = []
        self._marks: dict[int, np.ndarray] = {}

    def begin(self, kernel: str) -> None:
        """A launch begins."""
        self.launched.add(kernel)
        self.orders.append([])
        self.kernel = kernel
        self._arguments, self._marks = [], {}

    def number(self, tensor: torch.Tensor) -> int:
        """The number of an argument of the launch, from 1 on."""
        storage = tensor.untyped_storage()
        marks = self._marks.setdefault(storage.data_ptr(), np.zeros(len(storage), np.uint8))
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        elements = np.zeros(last + 1 if tensor.numel() else 0, bool)
        if tensor.numel():
            np.lib.stride_tricks.as_strided(elements, tensor.shape, tensor.stride())[...] = True
        self._arguments.append(Argument(tensor, elements, tensor.data_ptr() - storage.data_ptr(), marks))
        return len(self._arguments)

    def arrange(self, programs: int) -> list[int]:
        """The programs of a grid in the order in which they are to run."""
        places = list(range(programs))
        if self._random is not None:
            self._random.shuffle(places)
        return places

    def judge(self, addresses: np.ndarray, mask: np.ndarray, store: bool) -> np.ndarray:
        """The addresses without their numbers; an error of those that the mask keeps and the rules do not."""
        kept = addresses[np.broadcast_to(mask, addresses.shape)]
        numbers = kept >> np.uint64(ADDRESS_BITS)
        for number in np.unique(numbers):
            self._judge(self._arguments[int(number) - 1], kept[numbers == number] & ADDRESS, store)
        return addresses & ADDRESS

    def _judge(self, argument: Argument, addresses: np.ndarray, store: bool) -> None:
        tensor, marks = argument.tensor, argument.marks
        offset = addresses.astype(np.int64) - tensor.data_ptr()
        place = offset // tensor.element_size()
        inside = (offset % tensor.element_size() == 0) & (place >= 0) & (place < len(argument.elements))
        inside[inside] = argument.elements[place[inside]]
        verb = "stores to" if store else "loads"
        if not inside.all():
            raise AssertionError(f"{self.kernel} {verb} what is no element of a tensor {tuple(tensor.shape)}")
        byte = argument.begin + offset
        if store and (len(np.unique(byte)) < len(byte) or (marks[byte] & STORED).any()):
            raise AssertionError(f"{self.kernel} stores to an element twice, of a tensor {tuple(tensor.shape)}")
        if (marks[byte] & (LOADED if store else STORED)).any():
            raise AssertionError(f"{self.kernel} loads and stores to an element of a tensor {tuple(tensor.shape)}")
        marks[byte] |= STORED if store else LOADED


@contextmanager
def guarded(seed: int | None = None) -> Iterator[Guard]:
    """Interprets the launches of the block under guard.

    Args:
        seed: of the order of a launch's programs; None: 0, 1, …

    Raises:
        InterpreterError: from the launch, with the guard's words, where a rule is broken.
    """
    guard, builder = Guard(seed), interpreter.interpreter_builder
    call, convert = interpreter.GridExecutor.__call__, interpreter._implicit_cvt
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store
    arranged: list[int] = []

    def launch(executor, *args, **kwargs):
        guard.begin(f"{executor.fn.__module__}.{executor.fn.__name__}")
        return call(executor, *args, **kwargs)

    def numbered(argument):
        converted = convert(argument)
        if hasattr(argument, "data_ptr"):
            converted.handle.data += np.uint64(guard.number(argument) << ADDRESS_BITS)
        return converted

    def arrange(x, y, z):
        assert y == z == 1
        arranged[:] = guard.arrange(x)
        set_dim(x, y, z)

    def choose(x, y, z):
        guard.orders[-1].append(arranged[x])
        set_index(arranged[x], y, z)

    def judged_load(pointers, mask, *rest):
        plain = guard.judge(pointers.data, mask.data, store=False)
        return load(interpreter.TensorHandle(plain, pointers.dtype), mask, *rest)

    def judged_store(pointers, value, mask, *rest):
        plain = guard.judge(pointers.data, mask.data, store=True)
        return store(interpreter.TensorHandle(plain, pointers.dtype), value, mask, *rest)

    def refused(*_):
        raise AssertionError(f"{guard.kernel} has an atomic operation: its result is one of the order of programs")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        patch.setattr(interpreter, "_implicit_cvt", numbered)
        patch.setattr(builder, "set_grid_dim", arrange)
        patch.setattr(builder, "set_grid_idx", choose)
        patch.setattr(builder, "create_masked_load", judged_load)
        patch.setattr(builder, "create_masked_store", judged_store)
        patch.setattr(builder, "create_atomic_rmw", refused)
        patch.setattr(builder, "create_atomic_cas", refused)
        yield guard
