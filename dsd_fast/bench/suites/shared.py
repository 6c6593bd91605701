"""What several suites measure with."""

from __future__ import annotations

import torch
from torch import Tensor

from dsd_fast.bench.case import Context
from dsd_fast.models import Model, load
from dsd_fast.models.mini.scenes import Scene

__all__ = ["PREDICTION_TOLERANCE", "middles", "mini", "on_h200", "relative", "rivals"]

PREDICTION_TOLERANCE = 1e-5
"""Of a float32 prediction, relative to its largest value: what batches of another size, or another memory layout, may
change, since convolutions then sum in another order."""


def mini(context: Context) -> Model:
    """The embedded model on the run's device, loaded once."""
    return context.shared("mini", lambda: load("mini", device=context.device, local_files_only=True))


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
