"""The network's memory-bound operators beside plain torch and beside what the compiler makes of it.

Shapes are those of SD 1.5's UNet at 16 rows. Each operator reads and writes channels-last tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.bench.case import Context, Side, Target, UnavailableError, Work
from dsd_fast.bench.suites.judging import MEASURE, TOLERANCE, Judge, gradients
from dsd_fast.kernels.add_layer_norm import add_layer_norm
from dsd_fast.kernels.common import backend
from dsd_fast.kernels.geglu import geglu
from dsd_fast.kernels.group_norm_silu import group_norm_silu

ROWS = 16
GROUPS = 32
EPS = 1e-5

EAGER, COMPILED, OURS = "plain torch", "plain torch, compiled", "triton"

# Channels and the side of the image, by name: the three upper levels of SD 1.5.
LEVELS = {"320x64": (320, 64), "640x32": (640, 32), "1280x16": (1280, 16)}

# An operator stays only where it beats the compiler.
LEAST = 1.0

Function = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Piece:
    """One of the operators.

    Attributes:
        ours, plain: (inputs) → results.
        sizes: (channels, side, rows) → sizes of the inputs, activations first and parameters last.
        flows: how many of the inputs are activations.
    """

    ours: Function
    plain: Function
    sizes: Callable[[int, int, int], Sequence[tuple[int, ...]]]
    flows: int


def _norm(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    return (group_norm_silu(x, weight, bias, GROUPS, EPS, shift=shift),)


def _plain_norm(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    return (F.silu(F.group_norm(x + shift[:, :, None, None], GROUPS, weight, bias, EPS)),)


def _plain_geglu(x: Tensor) -> Sequence[Tensor]:
    value, gate = x.chunk(2, dim=-1)
    return (value * F.gelu(gate),)


def _plain_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
    total = x + residual
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, EPS)


PIECES = {
    "group-norm-silu": Piece(_norm, _plain_norm, lambda c, s, b: ((b, c, s, s), (b, c), (c,), (c,)), 2),
    # The activation of a feed-forward block four times as wide as the stream.
    "geglu": Piece(lambda x: (geglu(x),), _plain_geglu, lambda c, s, b: ((b, s * s, 8 * c),), 1),
    "add-layer-norm": Piece(
        partial(add_layer_norm, eps=EPS), _plain_add_norm, lambda c, s, b: (*[(b, s * s, c)] * 2, (c,), (c,)), 2
    ),
}


def forward(name: str, level: str, dtype: str, context: Context, rows: int = ROWS) -> Work:
    """An operator's result."""
    piece, given = PIECES[name], _inputs(name, level, dtype, context.device, rows)
    runs = {name: torch.no_grad()(partial(call, *given)) for name, call in forms(piece, given).items()}
    with torch.no_grad():
        truth = piece.plain(*(x.double() for x in given))
        naive = piece.plain(*given)
    return work(runs, byte_count(given) + byte_count(naive), truth, naive, dtype, rows)


def backward(name: str, level: str, dtype: str, context: Context, rows: int = ROWS) -> Work:
    """The gradients of all its inputs; the forward pass is not timed."""
    piece, given = PIECES[name], _inputs(name, level, dtype, context.device, rows)
    calls = forms(piece, given)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        results = piece.plain(*given)
    grads = [torch.randn(each.shape, generator=generator).to(each) for each in results]
    runs = {name: gradients(call, given, grads) for name, call in calls.items()}
    truth = gradients(piece.plain, [x.double() for x in given], grads)()
    # What must be read: the activations and the results' gradients; what must be written: the inputs' gradients.
    moved = byte_count(given[: piece.flows]) + byte_count(grads) + byte_count(given)
    return work(runs, moved, truth, runs[EAGER](), dtype, rows)


def _inputs(name: str, level: str, dtype: str, device: str, rows: int) -> list[Tensor]:
    """Of unit variance; images in channels-last."""
    generator, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)
    channels, side = LEVELS[level]
    made = []
    for size in PIECES[name].sizes(channels, side, rows):
        x = torch.randn(size, generator=generator).to(device, kind)
        made.append(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)
    return made


def forms(piece: Piece, given: Sequence[Tensor]) -> dict[str, Function]:
    """Plain torch, plain torch compiled, and our kernel, by name."""

    def ours(*inputs: Tensor) -> Sequence[Tensor]:
        # Unless it is forced, an operator leaves what a compiler can fuse to the compiler. float64 is the oracle's.
        if inputs[0].dtype == torch.float64:
            return piece.ours(*inputs)
        with backend.force(OURS):
            return piece.ours(*inputs)

    try:
        with torch.no_grad():
            ours(*given)
    except (ModuleNotFoundError, ValueError) as error:
        raise UnavailableError(str(error)) from error
    # Compilations are kept by code object, and only a few of them: each case starts without those of the others.
    torch._dynamo.reset()
    compiled: Any = torch.compile(piece.plain, dynamic=False)
    return {EAGER: piece.plain, COMPILED: compiled, OURS: ours}


def work(
    runs: Mapping[str, Callable[[], Sequence[Tensor]]],
    moved: int,
    truth: Sequence[Tensor],
    naive: Sequence[Tensor],
    dtype: str,
    rows: int,
) -> Work:
    """The sides, ours judged and measured against both others; the truth is in float64.

    Args:
        runs: of each side, by its name.
        moved: bytes that must be read and written.
        truth, naive: the right results, and plain torch's.
        dtype: of the bulk of the arithmetic.
        rows: what a run makes.
    """
    judge = Judge([each.detach() for each in truth], [each.detach() for each in naive])
    targets = {EAGER: (), COMPILED: (Target("ratio", LEAST),)}
    sides = [
        # They multiply no matrices: what they do is move bytes.
        Side(name, run, rows, {"rows": rows}, moved, flops=0, against=targets if name == OURS else {})
        for name, run in runs.items()
    ]
    return Work(
        sides=sides,
        difference=judge,
        tolerance=TOLERANCE,
        accuracy=MEASURE,
        oracle=lambda: judge.truth,
        oracle_name="plain torch in float64",
        item="row",
        items=rows,
        dtype=dtype,
        launches=False,
    )


def byte_count(tensors: Sequence[Tensor]) -> int:
    """Of all elements."""
    return sum(each.numel() * each.element_size() for each in tensors)
