"""Which implementation of an operator runs.

``DSD_FAST_BACKEND`` forces one implementation for every operator, ``DSD_FAST_BACKEND_<OPERATOR>`` for one, and
:func:`force` for the length of a ``with`` block; the narrowest wins. Without any of them each operator takes its
own default. Asking for an implementation that an operator does not have is an error, never a silent fallback.

What is forced in a forward pass is forced in its backward pass too, whatever thread that runs in: torch differentiates
what is on a GPU in a thread of its own, which no ``with`` block reaches.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from dsd_fast.kernels.common import native

BACKENDS = ("reference", "cpu", "triton")

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that compiled kernels take; float64 is the reference's."""

_forced: ContextVar[str | None] = ContextVar("dsd_fast_backend", default=None)
_last: dict[str, str] = {}


def choose(operator: str, available: Sequence[str], earlier: str | None = None) -> str:
    """The implementation of ``operator`` to run now: the forced one, or the first of ``available``.

    Args:
        operator: its name.
        available: what it has for these inputs.
        earlier: in a backward pass what :func:`forced_for` gave in the forward pass: it comes before all else.

    Raises:
        ValueError: the forced name is unknown, or ``operator`` has no such implementation for these inputs.
    """
    _last[operator] = name = choice(operator, available, earlier)
    return name


def choice(operator: str, available: Sequence[str], earlier: str | None = None) -> str:
    """What :func:`choose` would answer, for those who only want to know."""
    name, source = _forcing(operator) if earlier is None else (earlier, "in the forward pass")
    if name is None:
        return available[0]
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    if name not in available:
        raise ValueError(
            f"{source}: operator {operator} has no {name!r} implementation for these inputs; it has "
            f"{', '.join(available)}"
        )
    return name


def forced_for(operator: str) -> str | None:
    """The implementation of ``operator`` that is forced now; None where it takes its default."""
    return _forcing(operator)[0]


def _forcing(operator: str) -> tuple[str | None, str]:
    """The forced name, and what forces it."""
    name, source = _forced.get(), "force()"
    if name is None:
        for source in (f"DSD_FAST_BACKEND_{operator.upper()}", "DSD_FAST_BACKEND"):
            name = os.environ.get(source) or None
            if name is not None:
                break
    return name, source


def forced() -> Hashable:
    """All that forces an implementation now; equal as long as the same calls take the same implementations."""
    return _forced.get(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("DSD_FAST_BACKEND")))


@functools.cache
def available(device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The implementations that an operator with a Triton and a C++ form has for such inputs, the default first.

    On a CPU Triton runs under its interpreter alone (``TRITON_INTERPRET=1``), and only where it is forced. Where
    Triton is missing on a GPU the reference runs.
    """
    if dtype not in KERNEL_DTYPES:
        return ("reference",)
    if device == "cuda":
        return ("triton", "reference") if has_triton() else ("reference",)
    if device != "cpu":
        return ("reference",)
    names = ("cpu", "reference") if native.load() else ("reference",)
    return (*names, "triton") if os.environ.get("TRITON_INTERPRET") == "1" and has_triton() else names


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; the log says once if it is not."""
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        logging.getLogger(__name__).warning("Triton is not installed: operators run in plain torch, much slower")
        return False
    return True


def last(operator: str) -> str | None:
    """The implementation that the latest call of ``operator`` in this process took; None before the first."""
    return _last.get(operator)


@contextmanager
def force(name: str) -> Iterator[None]:
    """Force the implementation ``name`` for every operator inside the ``with`` block (this thread or task only).

    And for the gradients of what was computed in the block, wherever they are computed.
    """
    if name not in BACKENDS:
        raise ValueError(f"name: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
