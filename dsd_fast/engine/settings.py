"""Frozen dataclasses of settings: their values are plain Python, and one outside its range is refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dsd_fast.diffusion import SAMPLERS

LARGEST = sys.float_info.max

Allowed = Callable[[Any], bool]
Fields = Mapping[str, tuple[Allowed, str]]
"""By name: which values are allowed, and what errors say was expected."""


def check_fields(settings: Any, expected: Fields) -> None:
    """Make the values of a dataclass plain Python, of which JSON is made, and check them; for ``__post_init__``.

    Raises:
        ValueError: a value outside its range, by name.
    """
    for name, (allowed, what) in expected.items():
        value = getattr(settings, name)
        value = tuple(value) if isinstance(value, list) else value
        value = value.item() if isinstance(value, np.generic) else value
        # Past the guard of a frozen dataclass.
        object.__setattr__(settings, name, value)
        if not allowed(value):
            raise ValueError(f"{name}: got {value!r}, expected {what}")


def integer(least: int, most: float = np.inf) -> Allowed:
    """Allow integers within bounds."""
    return lambda x: isinstance(x, int | np.integer) and not isinstance(x, bool) and bool(least <= x <= most)


def number(low: float, high: float = LARGEST) -> Allowed:
    """Allow numbers within bounds, which are finite."""
    return lambda x: isinstance(x, int | float | np.number) and not isinstance(x, bool) and bool(low <= x <= high)


def above(low: float, high: float = LARGEST) -> Allowed:
    """Allow numbers above one bound, up to the other."""
    return lambda x: number(low, high)(x) and x > low


def or_none(allowed: Allowed) -> Allowed:
    """Allow None, too."""
    return lambda x: x is None or allowed(x)


def one_of(*values: object) -> Allowed:
    """Allow some values."""
    return lambda x: x in values


def is_bool(x: object) -> bool:
    """Allow True and False."""
    return isinstance(x, bool)


def is_text(x: object) -> bool:
    """Allow a str."""
    return isinstance(x, str)


def is_size(x: object) -> bool:
    """Allow (height, width)."""
    return isinstance(x, tuple) and len(x) == 2 and all(map(integer(1), x))


def is_span(x: object) -> bool:
    """Allow (first, one past the last)."""
    return isinstance(x, tuple) and len(x) == 2 and all(map(integer(0), x)) and x[0] < x[1]


def is_scheduler(x: object) -> bool:
    """Allow the name of a sampler, or a diffusers scheduler."""
    return x in SAMPLERS if isinstance(x, str) else hasattr(x, "config") and hasattr(x, "step")


def are_names(x: object) -> bool:
    """Allow a name or several."""
    return isinstance(x, str) or (isinstance(x, tuple) and all(isinstance(each, str) for each in x))
