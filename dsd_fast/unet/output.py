"""What a plan answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Output:
    """What a plan answers, one entry per requested row.

    Attributes:
        features: layer id → (B, C, h, w) in the network's type; a ``…-map`` id → (B, H, L, T).
        scores: score id → (B, H) float32, natural logarithm.
        maps: score id → (B, n, h, w) float32, probabilities averaged over heads.
        noise_pred: (B, C, h, w), the model's output as diffusers gives it (v for v-models), or None.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    noise_pred: Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors with a name each, in a fixed order."""
        for kind in ("features", "scores", "maps"):
            for name, value in getattr(self, kind).items():
                yield f"{kind}[{name}]", value
        if self.noise_pred is not None:
            yield "noise_pred", self.noise_pred

    def fill(self, other: Output, rows: Tensor | slice) -> None:
        """Copy ``other`` into the rows ``rows`` of this one."""
        for (name, target), (given, value) in zip(self.tensors(), other.tensors(), strict=True):
            if name != given or target.shape[1:] != value.shape[1:]:
                raise ValueError(
                    f"out: {name} {tuple(target.shape)} cannot hold {given} {tuple(value.shape)} of this plan"
                )
            target[rows] = value.to(target.device, target.dtype)
