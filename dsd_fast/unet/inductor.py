"""The regions of a network compiled by Inductor, those of equal structure once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch

from dsd_fast.kernels.common import backend


class Inductor:
    """Calls functions of tensors as code that Inductor generated; differentiable.

    A region's function is given its steps, and with them its modules, so that blocks of equal structure share one
    compilation. What must not be shared (an adapter on one block and not on another) Dynamo's guards tell apart, and
    it is compiled beside. Dynamo keeps compilations by code object and looks through all of one at each call, so each
    kind of region has its own code object in each bucket.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """``backend``: of :func:`torch.compile`; "aot_eager" traces and differentiates but generates nothing."""
        self._backend = backend
        self._functions: dict[Hashable, Callable[..., Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # What was compiled belongs to the network that it was compiled for, and to this process.
        return Inductor, (self._backend,)

    def call(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``function``, compiled at the first call with an equal ``key``."""
        # Here, because importing Dynamo takes longer than the rest of the package.
        from torch._dynamo.exc import FailOnRecompileLimitHit

        compiled = self._functions.get(key)
        if compiled is None:
            compiled = self._functions[key] = self._compile(function)
        try:
            return compiled(*arguments)
        except FailOnRecompileLimitHit:
            # An adapter whose strength is another at every call: what was compiled for the earlier ones is let go.
            compiled = self._functions[key] = self._compile(function)
            return compiled(*arguments)

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        assert isinstance(function, FunctionType)
        own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        return torch.compile(own, fullgraph=True, dynamic=False, backend=self._backend)


def settings() -> Hashable:
    """Tell what compiled and recorded work keeps though it can be changed from outside: implementations, precision."""
    precision = (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
    )
    return backend.forced(), precision
