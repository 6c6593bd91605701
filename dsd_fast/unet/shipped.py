"""Whether what stands in a network is what its library ships, however it is called and whenever it was changed.

A class is told by the methods that a call of it reaches, and a method by the module that it was written in: a name can
be borrowed, and what was replaced before this package was imported must be seen too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from functools import partial
from types import FunctionType
from typing import Any

# What torch's module goes through from a call to ``forward``.
CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")
LIBRARIES = frozenset({"torch", "diffusers", "transformers", "huggingface_hub", "accelerate", "peft"})


def told(thing: Any) -> str:
    """Give the name of a class or function with that of its module; an object's is its class's."""
    while isinstance(thing, partial):
        thing = thing.func
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{home(thing) or named.__module__}.{named.__qualname__}"


def home(function: Any) -> str:
    """Give the name of the module whose code a function, a method or a partial of one is; "" of what has no code."""
    while isinstance(function, partial) or inspect.ismethod(function):
        function = function.func if isinstance(function, partial) else function.__func__
    return str(function.__globals__.get("__name__", "")) if isinstance(function, FunctionType) else ""


def of_library(function: Any) -> bool:
    """Whether the code of a function, a method or a partial of one is that of torch, diffusers or the like."""
    return home(function).partition(".")[0] in LIBRARIES


def is_shipped(kind: type, name: str) -> bool:
    """Whether the method ``name`` that a class has, or inherits, is the one in the body of a library's class."""
    owner = next((base for base in kind.__mro__ if name in vars(base)), object)
    function: Any = vars(owner).get(name)
    if isinstance(function, property):
        function = function.fget
    while hasattr(function, "__wrapped__"):
        # Of torch's wrappers only a compiler's gives the same answers.
        if not of_library(function) or (home(function).startswith("torch.") and "._dynamo." not in home(function)):
            return False
        function = function.__wrapped__
    # Not the function's own __module__ and __qualname__, which decorators copy and anyone may set.
    module = sys.modules.get(owner.__module__)
    if not isinstance(function, FunctionType) or module is None or function.__globals__ is not vars(module):
        return False
    names = CALLS if name in CALLS else (name,)
    return of_library(function) and function.__code__.co_qualname in {f"{owner.__qualname__}.{each}" for each in names}


def reached(kind: type, begin: Iterable[str]) -> tuple[str, ...]:
    """Give the names of the class's own methods that those named ``begin`` call, and of those among them."""
    own = {name: inspect.unwrap(value) for name, value in vars(kind).items() if isinstance(value, FunctionType)}
    names = [name for name in sorted(begin) if name in own]
    for name in names:
        # What is appended here is looked at in its turn.
        names += [called for called in own[name].__code__.co_names if called in own and called not in names]
    return tuple(names)
