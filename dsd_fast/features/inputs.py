"""What all techniques of a few images share: latents, condition pictures, noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsd_fast.diffusion import Predict, RowNoise
from dsd_fast.engine import Engine, draw_noise
from dsd_fast.features.technique import Technique
from dsd_fast.images import to_picture
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.controlnet import Control


@dataclass(frozen=True)
class Prompts:
    """Which prompt each image has.

    Attributes:
        given: one for all, or one each.
    """

    given: str | Sequence[str]

    def check(self, count: int | None) -> None:
        """Refuses what is no text, and another number of prompts than of images; None: their number is unknown."""
        if isinstance(self.given, str):
            return
        for number, text in enumerate(self.given):
            if not isinstance(text, str):
                raise ValueError(f"prompts[{number}] is of type {type(text).__name__}, expected str")
        if count is not None and len(self.given) != count:
            raise ValueError(f"prompts: got {len(self.given)} for {count} images, expected one, or one each")

    def of(self, numbers: Sequence[int]) -> list[str]:
        """The prompts of the images of those numbers."""
        if isinstance(self.given, str):
            return [self.given] * len(numbers)
        if numbers and max(numbers) >= len(self.given):
            raise ValueError(f"prompts: got {len(self.given)}, expected one for each image")
        return [self.given[number] for number in numbers]


def own_prompts(technique: Technique, request: Prompts) -> Prompts:
    """The prompts of a technique, or the request's where it has none."""
    return request if technique.prompts is None else Prompts(technique.prompts)


class Inputs:
    """A few images, encoded.

    Attributes:
        numbers: their positions in the request.
        pixels: each (3, height, width) in [−1, 1].
        latents: (n, C, h, w) clean latents in the network's type.
        seeds: of their noise, n of them.
        noise: (1, 1, D, C, h, w), or (n, …) where each image has its own, float32 on the CPU.

    Args:
        seeds: of the noise, one for all images, or one each.
        draws: D.

    Raises:
        ValueError: a seed that is none.
    """

    def __init__(
        self, numbers: Sequence[int], pixels: Sequence[Tensor], latents: Tensor, seeds: Sequence[int], draws: int
    ) -> None:
        self.numbers, self.pixels, self.latents = numbers, pixels, latents
        self.noise = torch.empty(0, dtype=torch.float32, device="cpu")
        if numbers:
            self.noise = draw_noise(seeds, draws, latents.shape[1:])[:, None]
        self.seeds = list(seeds) if len(seeds) == len(numbers) else [*seeds] * len(numbers)
        self._conditions: dict[object, Tensor] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def step_noise(self) -> RowNoise:
        """Make what a scheduler draws at its steps for n · D latents, image by image; none of it is ``noise``."""
        draws = self.noise.shape[2]
        return RowNoise([seed for seed in self.seeds for _ in range(draws)], together=draws)

    def conditions(self, controls: Sequence[Control]) -> list[Tensor]:
        """(n, 3, H, W) in [0, 1] for each net, where the latents are and in their type; the same function of the
        pictures is computed once."""
        for control in controls:
            if control.condition not in self._conditions:
                prepared = [control.prepare(to_picture(each), (each.shape[1], each.shape[2])) for each in self.pixels]
                self._conditions[control.condition] = upload(
                    torch.stack(prepared), self.latents.device, self.latents.dtype
                )
        return [self._conditions[control.condition] for control in controls]


def chosen_seeds(seed: int, seeds: Sequence[int] | None, numbers: Sequence[int]) -> Sequence[int]:
    """The seeds of the images of those numbers: of all images the one, unless there is one for each of the request.

    Raises:
        ValueError: fewer seeds than images.
    """
    if seeds is None:
        return [seed]
    if numbers and max(numbers) >= len(seeds):
        raise ValueError(f"seeds: got {len(seeds)}, expected one per image")
    return [seeds[number] for number in numbers]


def predictor(
    engine: Engine, inputs: Inputs, prompts: Sequence[str | None], repeats: int = 1, controlled: bool = True
) -> Predict:
    """Make what samplers call for the model's output for n · repeats latents, image by image, with their prompts.

    Args:
        prompts: one for each of the n images, or that several times over, for as many rows of each latent; None is the
            absent prompt of the family's sampler.
        repeats: latents in a row that belong to one image.
        controlled: whether the engine's ControlNets take part.
    """
    latent_of = torch.arange(len(inputs) * repeats, device="cpu").repeat(len(prompts) // len(inputs))  # (B,)
    texts, text_of = engine.texts(prompts)
    return engine.predict(
        texts,
        text_of.repeat_interleave(repeats),
        latent_of=latent_of,
        conditions=inputs.conditions(engine.controls) if controlled else (),
        condition_of=latent_of // repeats,
    )
