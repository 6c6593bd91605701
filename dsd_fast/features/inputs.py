"""What all techniques of a few images share: latents, condition pictures, noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsd_fast.diffusion import Predict
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
        noise: (1, 1, D, C, h, w), or (n, …) where each image has its own.
    """

    def __init__(self, numbers: Sequence[int], pixels: Sequence[Tensor], latents: Tensor, epsilon: Tensor) -> None:
        self.numbers, self.pixels, self.latents, self.noise = numbers, pixels, latents, epsilon
        self._conditions: dict[object, Tensor] = {}

    def __len__(self) -> int:
        return len(self.numbers)

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


def draws_of_noise(seed: int, seeds: Sequence[int] | None, numbers: Sequence[int], draws: int, shape: Tensor) -> Tensor:
    """The noise of :class:`Inputs`, float32 on the CPU.

    Args:
        seed: of all images, unless there are ``seeds``, one for each image of the request.
        shape: latents (n, C, h, w) that it is for.

    Raises:
        ValueError: fewer seeds than images, or one that is no integer of 32 bits.
    """
    if not numbers:
        return torch.empty(0, dtype=torch.float32, device="cpu")
    if seeds is not None and max(numbers) >= len(seeds):
        raise ValueError(f"seeds: got {len(seeds)}, expected one per image")
    chosen = [seed] if seeds is None else [seeds[number] for number in numbers]
    return draw_noise(chosen, draws, shape.shape[1:])[:, None]  # (1 or n, 1, D, C, h, w)


def predictor(
    engine: Engine, inputs: Inputs, prompts: Sequence[str | None], repeats: int = 1, controlled: bool = True
) -> Predict:
    """Make what samplers call for the model's output: B = m · repeats latents, image by image, with their prompts.

    Args:
        prompts: m of them, one for each of the n images, or that several times over; None is the absent prompt of the
            family's sampler.
        repeats: rows in a row that belong to one image.
        controlled: whether the engine's ControlNets take part.
    """
    image_of = (
        torch.arange(len(inputs), device="cpu").repeat(len(prompts) // len(inputs)).repeat_interleave(repeats)
    )  # (B,)
    texts, text_of = engine.texts(prompts)
    conditions = inputs.conditions(engine.controls) if controlled else ()
    return engine.predict(texts, text_of.repeat_interleave(repeats), conditions=conditions, condition_of=image_of)
