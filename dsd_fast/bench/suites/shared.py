"""What several suites measure with."""

from __future__ import annotations

import hashlib
from functools import cache

from dsd_fast.bench.case import Context
from dsd_fast.models import Model, load
from dsd_fast.models.mini import path

__all__ = ["middles", "mini", "mini_digest"]


def mini(context: Context) -> Model:
    """The embedded model on the run's device, loaded once."""
    return context.shared("mini", lambda: load("mini", device=context.device, local_files_only=True))


def middles(steps: int, total: int = 1000) -> list[int]:
    """The middles of `steps` equal parts of a schedule of `total` timesteps, so that one timestep is no extreme one."""
    return [total * (2 * place + 1) // (2 * steps) for place in range(steps)]


@cache
def mini_digest() -> str:
    """Eight hexadecimal digits that tell one set of embedded weights from another."""
    digest = hashlib.sha256()
    for file in sorted(path().rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]
