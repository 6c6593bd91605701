"""What several suites measure with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsd_fast.bench.case import Context, Side, Work
from dsd_fast.models import Model, load
from dsd_fast.models.mini.scenes import Scene
from dsd_fast.models.processor import units

__all__ = [
    "BFLOAT16_TOLERANCE",
    "DTYPES",
    "PREDICTION_TOLERANCE",
    "middles",
    "mini",
    "of_types",
    "on_h200",
    "relative",
    "rivals",
]

PREDICTION_TOLERANCE = 1e-5
"""Of a float32 prediction, relative to its largest value: what batches of another size, or another memory layout, may
change, since convolutions then sum in another order."""

DTYPES = ("float32", "bfloat16")
"""Types of the networks that are compared, the baseline first."""

BFLOAT16_TOLERANCE = 0.03
"""Of what a bfloat16 network answers, relative. Some 200 operations lie between its input and its output, each rounds
by up to 2⁻⁹ of a value, and independent errors add up as roots do: √200 · 2⁻⁹."""


def mini(context: Context, dtype: str = "float32") -> Model:
    """The embedded model on the run's device, loaded once for each type."""
    return context.shared(
        f"mini, {dtype}", lambda: load("mini", device=context.device, dtype=dtype, local_files_only=True)
    )


def of_types(side: Callable[[str], Side], **rest: Any) -> Work:
    """A job in each of :data:`DTYPES`: the side that is made for a type beside float32's, whose result is right.

    A side on a CPU names the instructions that it has for its type.

    Args:
        side: makes it.
        rest: of the :class:`Work`.
    """
    sides = []
    for dtype in DTYPES:
        made, by = side(dtype), " and ".join(units(getattr(torch, dtype)))
        sides.append(replace(made, name=f"{made.name}, {dtype}" + (f" by {by}" if by else ""), dtype=dtype))
    return Work(sides=sides, oracle_name=sides[0].name, **rest)


def relative(result: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest value that is right."""
    return float((result - right).abs().max() / right.abs().max())


def on_h200(device: str | torch.device) -> bool:
    """Whether the device is the GPU that rates are meant for."""
    return torch.device(device).type == "cuda" and "H200" in torch.cuda.get_device_name(device)


def middles(steps: int, total: int = 1000) -> list[int]:
    """The middles of `steps` equal parts of a schedule of `total` timesteps, so that one timestep is no extreme one."""
    return [total * (2 * place + 1) // (2 * steps) for place in range(steps)]


def rivals(drawn: Scene) -> dict[str, str]:
    """The two captions without another relation that a scene's caption stands against: of colour, shape and swap those
    that the scene has, all but one chosen by its seed.
    """
    negatives = drawn.negatives()
    kinds = [kind for kind in ("colour", "shape", "swap") if kind in negatives]
    if len(kinds) == 3:
        kinds.pop(drawn.seed % 3)
    return {kind: negatives[kind] for kind in kinds}
