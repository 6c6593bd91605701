"""Settings of a :class:`~dsd_fast.matching.Matcher`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Layers = str | Sequence[str] | Mapping[str, float | Sequence[float]]


@dataclass(frozen=True)
class MatchConfig:
    """How an image and a text are compared (DSD, He et al., arXiv 2305.10722).

    The score of a pair is the mean over timesteps and noise draws of

        attention_weight · Σ_l w_l · mean over heads and positions of lse_l + noise_weight · (‖ε − ε_∅‖ − ‖ε − ε_text‖),

    where lse_l is the log-sum-exp of a cross-attention's logits over the text's keys, ε the noise added, and ε_∅ and
    ε_text the model's predictions without and with the text. With the default weights texts rank as the official
    code ranks them.

    Attributes:
        timesteps: a count on the official grid (50 gives 49 steps, as there), or the timesteps themselves.
        layers: "official" (of the down, middle and up part the last block with cross-attention; a part without any
            gives none, and a warning says so), "all" (every
            cross-attention), or score ids, with equal weights; or a mapping from score id to its weight or to one per
            head.
        attention_weight: weight of the attention term; 0 leaves it out.
        noise_weight: weight of the noise-prediction term; 0 leaves it out, and the network stops after the last layer
            that scores.
        draws: noise draws per timestep.
        seed: of the noise, which is the same for every image unless a call gives seeds.
        tokens: keys that the attention term counts: "all" (padding too, as the official code), or "real" (the words and
            the begin and end tokens). The network attends to all either way.
        pool: pooling of the attention term over positions: "mean", "max", or a temperature τ > 0 for
            τ·log mean exp(lse/τ).
        official: the exact official score: the attention term averages the text's row with the unconditional one's. It
            shifts all scores of an image alike.
        image_size: (height, width) in pixels that images are resized to; None is the model's own.
        memory_budget: bytes for one micro-batch and its texts' keys; None leaves it to the device.

    Raises:
        ValueError: a value that is not allowed, by name.
    """

    timesteps: int | Sequence[int] = 10
    layers: Layers = "official"
    attention_weight: float = 0.5
    noise_weight: float = 1.0
    draws: int = 1
    seed: int = 0
    tokens: str = "all"
    pool: str | float = "mean"
    official: bool = False
    image_size: tuple[int, int] | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("attention_weight", "noise_weight"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name}: got {value!r}, expected a finite number")
        if isinstance(self.timesteps, int) and self.timesteps < 1:
            raise ValueError(f"timesteps: got {self.timesteps}, expected a count of at least 1 or the timesteps")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed!r}, expected an integer from 0 to 2**32 - 1")
        if self.attention_weight == 0 and self.noise_weight == 0:
            raise ValueError("attention_weight, noise_weight: both are 0, which leaves nothing to score with")
        if not isinstance(self.draws, int) or self.draws < 1:
            raise ValueError(f"draws: got {self.draws!r}, expected an integer of at least 1")
        size = self.image_size
        if size is not None and not (isinstance(size, tuple) and len(size) == 2):
            raise ValueError(f"image_size: got {size!r}, expected (height, width) in pixels")
        if self.memory_budget is not None and not (isinstance(self.memory_budget, int) and self.memory_budget > 0):
            raise ValueError(f"memory_budget: got {self.memory_budget!r}, expected a number of bytes")
        if self.tokens not in ("all", "real"):
            raise ValueError(f"tokens: got {self.tokens!r}, expected 'all' or 'real'")
        if self.pool not in ("mean", "max") and not (isinstance(self.pool, (int, float)) and self.pool > 0):
            raise ValueError(f"pool: got {self.pool!r}, expected 'mean', 'max' or a temperature > 0")
        if isinstance(self.layers, str) and self.layers not in ("official", "all"):
            raise ValueError(
                f"layers: got {self.layers!r}, expected 'official', 'all', score ids, or weights by score id"
            )
        if not isinstance(self.layers, str) and not len(self.layers):
            raise ValueError("layers: got none, expected at least one score id")
        if self.official:
            fixed = {"layers": "official", "attention_weight": 0.5, "draws": 1, "tokens": "all", "pool": "mean"}
            for name, value in fixed.items():
                if getattr(self, name) != value:
                    raise ValueError(f"official: the official score has {name}={value!r}, got {getattr(self, name)!r}")
            if self.noise_weight not in (0, 1):
                raise ValueError(f"official: the official score has noise_weight 0 or 1, got {self.noise_weight!r}")
