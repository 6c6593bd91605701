"""What is extracted, and how it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsd_fast.features.layers import Layers

DTYPES = ("float32", "float16", "bfloat16", "float64")
PLACES = ("down_cross", "mid_cross", "up_cross", "down_self", "mid_self", "up_self")


@dataclass(frozen=True)
class FeatureConfig:
    """Settings of :class:`FeatureExtractor`; see there what each means.

    Raises:
        ValueError: a setting that is not allowed, by name.
    """

    layers: Layers = "practical"
    timesteps: Sequence[int] = (50,)
    attention: Sequence[str] = ()
    official_timesteps: bool = False
    draws: int = 1
    keep_draws: bool = False
    image_size: tuple[int, int] | None = None
    resize: int | tuple[int, int] | None = None
    pool: str | None = None
    normalize: bool = False
    dtype: str | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.timesteps, int):
            raise ValueError(f"timesteps: got the integer {self.timesteps}, expected a sequence of timesteps")
        if not self.timesteps:
            raise ValueError("timesteps: got none, expected at least one")
        if isinstance(self.attention, str) or len(set(self.attention)) != len(self.attention):
            raise ValueError(f"attention: got {self.attention!r}, expected a sequence of different places")
        for name in self.attention:
            if name not in PLACES:
                raise ValueError(f"attention: got {name!r}, expected of {', '.join(PLACES)}")
        if not isinstance(self.draws, int) or self.draws < 1:
            raise ValueError(f"draws: got {self.draws!r}, expected an integer of at least 1")
        if self.image_size is not None and not _is_size(self.image_size):
            raise ValueError(f"image_size: got {self.image_size!r}, expected (height, width) in pixels")
        if self.pool not in (None, "mean", "max"):
            raise ValueError(f"pool: got {self.pool!r}, expected 'mean', 'max' or None")
        if self.pool is not None and self.resize is not None:
            raise ValueError("resize, pool: both are given, and pooling leaves one position")
        factor = isinstance(self.resize, int) and not isinstance(self.resize, bool) and self.resize >= 1
        if self.resize is not None and not factor and not _is_size(self.resize):
            raise ValueError(f"resize: got {self.resize!r}, expected a factor of at least 1 or (height, width)")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.memory_budget is not None and not (isinstance(self.memory_budget, int) and self.memory_budget > 0):
            raise ValueError(f"memory_budget: got {self.memory_budget!r}, expected a number of bytes")


def _is_size(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value)
