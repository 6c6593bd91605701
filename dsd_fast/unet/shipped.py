"""Whether what stands in a network is what its library ships, however it is called and whenever it was changed.

A class is told by the methods that a call of it reaches, and a method by the module that it was written in: a name can
be borrowed, and what was replaced before this package was imported must be seen too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

# What torch's module goes through from a call to ``forward``.
CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")
LIBRARIES = frozenset({"torch", "diffusers", "transformers", "huggingface_hub", "accelerate", "peft"})


def told(thing: Any) -> str:
    """Give the name of a class or function with that of its module; an object's is its class's."""
    while isinstance(thing, partial | MethodType):
        thing = thing.func if isinstance(thing, partial) else thing.__func__
    if isinstance(thing, FunctionType):
        # A decorator copies the function's own name.
        return f"{home(thing)}.{thing.__code__.co_qualname}"
    named = thing if isinstance(thing, type | BuiltinFunctionType) else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def home(thing: Any) -> str:
    """Give the name of the module whose code a function, a method, a partial of one, a class or an object is."""
    while isinstance(thing, partial | MethodType):
        thing = thing.func if isinstance(thing, partial) else thing.__func__
    if isinstance(thing, FunctionType):
        return str(thing.__globals__.get("__name__", ""))
    return str((thing if isinstance(thing, type | BuiltinFunctionType) else type(thing)).__module__)


def of_library(thing: Any) -> bool:
    """Whether :func:`home` is in torch, diffusers or the like."""
    return home(thing).partition(".")[0] in LIBRARIES


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
