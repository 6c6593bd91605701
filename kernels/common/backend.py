"""Which implementation of an operator runs.

``DSD_FAST_BACKEND`` forces one implementation for every operator, ``DSD_FAST_BACKEND_<OPERATOR>`` for one, and
:func:`force` for the length of a ``with`` block; the narrowest wins. Without any of them each operator takes its
own default. Asking for an implementation that an operator does not have is an error, never a silent fallback.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

BACKENDS = ("reference", "cpu", "triton", "cuda")

_forced: ContextVar[str | None] = ContextVar("dsd_fast_backend", default=None)
_last: dict[str, str] = {}


def choose(operator: str, available: Sequence[str]) -> str:
    """The implementation of ``operator`` to run now: the forced one, or the first of ``available``.

    Raises:
        ValueError: the forced name is unknown, or ``operator`` has no such implementation for these inputs.
    """
    forced = _forced.get()
    source = "force()"
    if forced is None:
        for source in (f"DSD_FAST_BACKEND_{operator.upper()}", "DSD_FAST_BACKEND"):
            forced = os.environ.get(source) or None
            if forced is not None:
                break
    name = available[0] if forced is None else forced
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    if name not in available:
        raise ValueError(
            f"{source}: operator {operator} has no {name!r} implementation for these inputs; it has "
            f"{', '.join(available)}"
        )
    _last[operator] = name
    return name


def last(operator: str) -> str | None:
    """The implementation that the latest call of ``operator`` in this process took; None before the first."""
    return _last.get(operator)


@contextmanager
def force(name: str) -> Iterator[None]:
    """Force the implementation ``name`` for every operator inside the ``with`` block (this thread or task only)."""
    if name not in BACKENDS:
        raise ValueError(f"name: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
