"""The "inductor" runtime: each region of a plan compiled by itself, regions of equal structure once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from dsd_fast.kernels.common import backend
from dsd_fast.unet.execution import embed, run_regions
from dsd_fast.unet.output import Output
from dsd_fast.unet.request import Request, bucket
from dsd_fast.unet.text import TextKV

if TYPE_CHECKING:
    from dsd_fast.unet.plan import Plan


class Inductor:
    """Runs a plan's regions as code that Inductor generated; differentiable.

    A region's function is given its steps, and with them its modules, so that blocks of equal structure share one
    compilation. What must not be shared (an adapter on one block and not on another) Dynamo's guards tell apart, and
    it is compiled beside. Dynamo keeps compilations by code object and looks through all of one at each call, so each
    kind of region has its own code object in each bucket.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """``backend``: of :func:`torch.compile`; "aot_eager" traces and differentiates but generates nothing."""
        self._backend = backend
        self._functions: dict[Hashable, Callable[..., Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Inductor:
        # What was compiled belongs to the network that it was compiled for.
        return Inductor(self._backend)

    def held(self, text: TextKV) -> int:
        """Bytes of the padded copy of ``text`` that is kept beside it."""
        count = bucket(len(text))
        return 0 if count == len(text) else text.nbytes * count // max(1, len(text))

    def run(self, plan: Plan, request: Request, out: Output | None) -> Output:
        """The answer to ``request``, in ``out`` or in fresh tensors."""
        return self.compute(plan, request.padded()).cut(request.rows).into(out)

    def compute(self, plan: Plan, request: Request) -> Output:
        """The answer to a request of a bucket's size."""
        key = (request.key, settings(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        embedding = None
        if plan.reads_time:
            embedding = self._call(key, embed, plan.program.unet, *request.embedded())
        return run_regions(
            plan,
            request,
            embedding,
            lambda region: partial(self._call, (*key, region.kind)) if region.compiled else None,
        )

    def _call(self, key: Hashable, function: Callable[..., Any], *arguments: Any) -> Any:
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
    """What compiled and recorded work keeps though it can be changed from outside: implementations and precision."""
    precision = (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
    )
    return backend.forced(), precision
