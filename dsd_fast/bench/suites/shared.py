"""What several suites measure with."""

from __future__ import annotations

import hashlib
from functools import cache

from torch import Tensor

from dsd_fast.bench.case import Context
from dsd_fast.models import Model, load
from dsd_fast.models.mini import path

__all__ = ["PREDICTION_TOLERANCE", "middles", "mini", "mini_digest", "relative"]

PREDICTION_TOLERANCE = 1e-5
"""Of a float32 prediction, relative to its largest value: what batches of another size, or another memory layout, may
change, since convolutions then sum in another order."""


def mini(context: Context) -> Model:
    """The embedded model on the run's device, loaded once."""
    return context.shared("mini", lambda: load("mini", device=context.device, local_files_only=True))


def relative(result: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest value that is right."""
    return float((result - right).abs().max() / right.abs().max())


def middles(steps: int, total: int = 1000) -> list[int]:
    """The middles of `steps` equal parts of a schedule of `total` timesteps, so that one timestep is no extreme one."""
    return [total * (2 * place + 1) // (2 * steps) for place in range(steps)]


@cache
def mini_digest() -> str:
    """Eight hexadecimal digits that tell one set of the embedded model's weights from another.

    The ControlNet and the LoRA beside it change none of its own figures.
    """
    digest = hashlib.sha256()
    for file in sorted(path().rglob("*.safetensors")):
        if file.relative_to(path()).parts[0] not in ("controlnet", "lora"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]
