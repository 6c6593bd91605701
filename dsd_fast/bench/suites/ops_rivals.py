"""The attention operator on a GPU beside FlexAttention, whose score has a gradient too, and its launches beside each
other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsd_fast.bench.case import Context, Side, Target, UnavailableError, Work
from dsd_fast.bench.suites.ops_attention import Gradient, Run, Shape, inputs, named, work
from dsd_fast.kernels.common import backend
from dsd_fast.kernels.common.attention import join_heads, split_heads

FLEX = "FlexAttention, compiled, with its lse"


def flex_forward(shape: Shape, context: Context) -> Work:
    """Output and mean score."""
    made, call = inputs(shape, context), _flex(shape.heads)
    rival, ours = torch.no_grad()(lambda: call(made.q, made.keys, made.values)), torch.no_grad()(made.ours)
    sides = [
        Side(FLEX, rival, shape.rows, shape.sizes, flops=_flops(shape, 2)),
        Side(
            named("cross_attention_score", ours),
            ours,
            shape.rows,
            shape.sizes,
            shape.bytes(2, 2, shape.texts) + 4 * shape.rows * shape.heads,
        ),
    ]
    return work(shape, sides, made.ours(torch.float64), made.materialised())


def flex_backward(shape: Shape, context: Context, least: float) -> Work:
    """Gradients of q, k and v through the output and the score, ours meant to be ``least`` times faster."""
    made, call = inputs(shape, context), _flex(shape.heads)
    gradient = Gradient(made)
    rival, ours = gradient.by_row(call), gradient.by_text(gradient.ours)
    targets = {FLEX: (Target("ratio", least),)}
    sides = [
        Side(FLEX, rival, shape.rows, shape.sizes, flops=_flops(shape, 5), against={}),
        Side(named("cross_attention_score", ours), ours, shape.rows, shape.sizes, gradient.bytes, against=targets),
    ]
    return gradient.work(sides)


def launches(shape: Shape, context: Context, table: str = "LAUNCHES") -> Work:
    """The Triton kernels as they are launched now, beside the other ways that the kernels name as worth a try.

    Args:
        shape: of the call.
        context: of the run.
        table: of launches by width, one of the kernels' TUNING_CANDIDATES: "LAUNCHES" for output and mean score,
            "QUERY_LAUNCHES" and "TEXT_LAUNCHES" for the gradients of q, k and v.
    """
    try:
        from dsd_fast.kernels.common.kernel import widest
        from dsd_fast.kernels.cross_attention_score import kernel
    except ModuleNotFoundError as error:
        raise UnavailableError(str(error)) from error
    made, entries = inputs(shape, context), getattr(kernel, table)
    if shape.width > max(entries):
        raise UnavailableError(f"{table} has no entry for heads of {shape.width}")
    present = widest(entries, shape.width)
    try:
        with backend.force("triton"):
            gradient = None if table == "LAUNCHES" else Gradient(made)
            call = torch.no_grad()(made.ours) if gradient is None else gradient.by_text(gradient.ours)
            call()
    except ValueError as error:
        raise UnavailableError(str(error)) from error

    def launched(launch: Any) -> Run:
        def run() -> Any:
            with _entry(entries, shape.width, launch), backend.force("triton"):
                return call()

        return run

    moved = shape.bytes(2, 2, shape.texts) + 4 * shape.rows * shape.heads if gradient is None else gradient.bytes
    sides: list[Side] = []
    for launch in (present, *(each for each in kernel.TUNING_CANDIDATES[table] if each != present)):
        run = launched(launch)
        try:
            run()
        except Exception as error:
            # Triton's word for a launch that the device is too small for; only kernels import Triton.
            if type(error).__name__ != "OutOfResources":
                raise
            continue
        # What a launch is told of its occupancy follows from what it is.
        chosen = [field.name for field in dataclasses.fields(launch) if field.compare]
        name = ", ".join(f"{key} {getattr(launch, key)}" for key in chosen)
        against = {sides[0].name: ()} if sides else {}
        sides.append(Side(name, run, shape.rows, shape.sizes, moved, against=against))
    return (
        work(shape, sides, made.ours(torch.float64), made.materialised()) if gradient is None else gradient.work(sides)
    )


@contextmanager
def _entry(table: dict[int, Any], width: int, launch: Any) -> Iterator[None]:
    """``launch`` for heads of ``width`` inside the block."""
    limit = next(limit for limit in table if width <= limit)
    kept, table[limit] = table[limit], launch
    try:
        yield
    finally:
        table[limit] = kept


def _flex(heads: int) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(q, k, v) → output, mean score, all channels-last."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    # Compilations are kept by code object, and only a few of them: each case starts without those of the others.
    torch._dynamo.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = compiled(*(split_heads(x, heads) for x in (q, k, v)), return_aux=AuxRequest(lse=True))
        return join_heads(out), aux.lse.mean(-1)

    return call


def _flops(shape: Shape, products: int) -> int:
    return products * 2 * shape.rows * shape.length * shape.tokens * shape.heads * shape.width
