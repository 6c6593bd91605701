"""A convolutional network that names the one object of a picture: what tokens are learned from.

It is trained apart from the model and from the judge: another architecture, scenes of its own, half of them encoded and
decoded by the model's VAE. Held-out pairs are among them, since a token may be learned for one.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.mini.loop import Recipe
from benchmarks.suites.mini_card.judge import folder_of, learn
from dsd_fast.jobs import read_tensors
from dsd_fast.models.mini.scenes import COLOURS, SHAPES, SIZES, scene

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["ATTRIBUTES", "Attribute", "guide"]

ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES)}
"""What a single object is asked for, with the answers."""

FIRST_SEED = 600_000_000
"""Of the guide's scenes: neither the model's, nor the judge's, nor those for evaluation."""

_RECIPE = Recipe(steps=1500, batch=64, learning_rate=2e-3, weight_decay=0.02, ema=0.99, seed=1)
_PICTURES = 8192


class _Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64)
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in widths)
        self.residuals = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for width in widths)
        self.reductions = nn.ModuleList(nn.Conv2d(*pair, 3, 2, 1) for pair in itertools.pairwise(widths))
        self.answer = nn.Linear(widths[-1] * 4 * 4, sum(map(len, ATTRIBUTES.values())))

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.stem(pixels)
        for place, (norm, residual) in enumerate(zip(self.norms, self.residuals, strict=True)):
            hidden = hidden + residual(F.gelu(norm(hidden)))
            if place < len(self.reductions):
                hidden = self.reductions[place](F.gelu(hidden))
        return self.answer(F.adaptive_avg_pool2d(F.gelu(hidden), 4).flatten(1))  # type: ignore[no-any-return]


def guide(vae: AutoencoderKL) -> nn.Module:
    """The trained guide, from the cache; trained first where there is none (minutes)."""
    folder = folder_of("guide", vae, _RECIPE, _PICTURES, FIRST_SEED, _Guide())
    if not (folder / "guide-final.safetensors").exists():
        learn("guide", _Guide, [len(each) for each in ATTRIBUTES.values()], _example, vae, folder, _RECIPE, _PICTURES)
    network = _Guide()
    network.load_state_dict(read_tensors(folder / "guide-final.safetensors")[0])
    return network.eval().requires_grad_(False)


def _example(number: int) -> tuple[np.ndarray, list[int]]:
    drawn = scene(FIRST_SEED + number, objects=1, held_out=None)
    (item,) = drawn.objects
    return drawn.image, [values.index(getattr(item, name)) for name, values in ATTRIBUTES.items()]


class Attribute(nn.Module):
    """The guide's logits of one attribute, or of all combinations of several, the last one changing fastest."""

    def __init__(self, network: nn.Module, *names: str) -> None:
        super().__init__()
        self.network, self.names = network, names
        self.labels = [" ".join(each) for each in itertools.product(*(ATTRIBUTES[name] for name in names))]

    def forward(self, pixels: Tensor) -> Tensor:
        answers = self.network(pixels).split([len(each) for each in ATTRIBUTES.values()], -1)
        of = dict(zip(ATTRIBUTES, answers, strict=True))
        joint: Tensor = of[self.names[0]].log_softmax(-1)
        for name in self.names[1:]:
            joint = (joint[:, :, None] + of[name].log_softmax(-1)[:, None]).flatten(1)
        return joint
