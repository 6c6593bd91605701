"""Attention maps as features, aggregated as the official extractor does, none of them kept by head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.unet import Output, UNetProgram

KEY = "attn"


class AttentionTap:
    """The maps of chosen places of a UNet, averaged over heads and over the layers of equal size.

    For each place in turn, and in it for each size in the order of execution, the mean over its layers of the softmax
    maps, whose channels are the text's tokens or, of a self-attention, the positions attended to; enlarged to the
    latents' size (nearest) and laid side by side. Layers of as many positions as maps of a quarter to a half of the
    latents' side have count (Darkbblue/generic-diffusion-feature, `aggregate_attention`: 1/32 to 1/16 of the
    picture's).

    Args:
        places: of "down", "mid", "up" with "_cross" or "_self".
        size: (h, w) of the latents.
        tokens: T.

    Attributes:
        ids: map ids that a plan is asked for.
        channels: of the result.

    Raises:
        ValueError: a place without such layers.
    """

    def __init__(self, program: UNetProgram, places: Sequence[str], size: tuple[int, int], tokens: int) -> None:
        sizes = program.sizes(*size)
        low, high = (size[0] // 4) * (size[1] // 4), (size[0] // 2) * (size[1] // 2)
        self._size = size
        self._groups: list[list[str]] = []
        self.channels = 0
        steps = {step.name: step for step in program.steps}
        for place in places:
            part, kind = place.split("_")
            grouped: dict[tuple[int, int], list[str]] = {}
            for name in program.map_ids:
                found = sizes[steps[name].level]
                if name.startswith(f"{part}-") and name.endswith(f"-{kind}") and low <= found[0] * found[1] <= high:
                    grouped.setdefault(found, []).append(name)
            if not grouped:
                raise ValueError(f"attention: {place!r} has no layer of a quarter to a half of the latents' side")
            self._groups += grouped.values()
            self.channels += sum(steps[names[0]].keys(found, tokens) for found, names in grouped.items())
        self.ids = tuple(name for group in self._groups for name in group)

    def gather(self, out: Output) -> Tensor:
        """(B, channels, h, w) float32 (float64 for a float64 network) from what the plan answered."""
        means = [torch.stack([out.maps[name] for name in group]).mean(0) for group in self._groups]
        return torch.cat([F.interpolate(mean, size=self._size, mode="nearest") for mean in means], dim=1)
