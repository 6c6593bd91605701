"""The "inductor" runtime: each region of a plan compiled by itself, regions of equal structure once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsd_fast.kernels.common import backend
from dsd_fast.unet.execution import Cut, Region, advance, collect, embed, start
from dsd_fast.unet.output import Output
from dsd_fast.unet.request import Request, bucket
from dsd_fast.unet.step import Size, State, Taken
from dsd_fast.unet.text import LayerText, TextKV

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
        state, output = start(plan, request, embedding), Output()
        for region in plan.regions:
            if region.layer is not None:
                assert request.text is not None
                state.text = request.text.layer(region.layer)
            if region.compiled:
                collect(plan, output, region.cut, self._region((*key, region.kind), region, state))
            else:
                collect(plan, output, region.cut, advance(region.cut, state))
        return output

    def _region(self, key: Hashable, region: Region, state: State) -> list[Taken]:
        """Like :func:`~dsd_fast.unet.execution.advance`: here is what the region reads and writes of the state."""
        pops = sum(step.pops for step, _ in region.cut)
        popped = [state.skips.pop() for _ in range(pops)]
        residuals = [state.residuals[0][number] for number, _, _ in popped] if state.residuals is not None else None
        pushes = sum(1 for step, _ in region.cut if step.pushes)
        taken, changed, names, pushed, state.expanded = self._call(
            key,
            _compute,
            region.cut,
            tuple(state.sizes),
            tuple(state.pushed + i in state.keep for i in range(pushes)),
            (state.expanded, state.embedding_expanded),
            state.live,
            [(value, expanded) for _, value, expanded in popped],
            residuals,
            state.embedding,
            state.latent_index,
            state.text_index,
            state.text if region.layer is not None else None,
            state.map_tokens,
        )
        state.live = {name: changed[name] if name in changed else state.live[name] for name in names}
        state.skips += [(state.pushed + number, value, expanded) for number, value, expanded in pushed]
        state.pushed += pushes
        return [Taken(*values) for values in taken]

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


def _compute(
    cut: Cut,
    sizes: tuple[Size, ...],
    kept: tuple[bool, ...],
    expanded: tuple[bool, bool],
    live: dict[str, Tensor],
    skips: list[tuple[Tensor, bool]],
    residuals: list[Tensor] | None,
    embedding: Tensor,
    latent_index: Tensor | None,
    text_index: Tensor | None,
    text: LayerText | None,
    map_tokens: Tensor | None,
) -> tuple[Any, ...]:
    """A region as a function of tensors: what is taken, the live values that changed, the names of all, the skips."""
    state = State(
        embedding=embedding,
        latent_index=latent_index,
        text_index=text_index,
        sizes=sizes,
        keep=frozenset(number for number, keep in enumerate(kept) if keep),
        text=text,
        # The middle's residual belongs to a step that is never compiled.
        residuals=None if residuals is None else (residuals, embedding),
        map_tokens=map_tokens,
        embedding_expanded=expanded[1],
        expanded=expanded[0],
        live=dict(live),
        skips=[(number, value, done) for number, (value, done) in enumerate(skips)],
    )
    taken = advance(cut, state)
    changed = {name: value for name, value in state.live.items() if value is not live.get(name)}
    return (
        [(each.feature, each.score, each.maps) for each in taken],
        changed,
        tuple(state.live),
        state.skips,
        state.expanded,
    )
