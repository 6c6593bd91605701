"""What all techniques of a few images share: latents, condition pictures, text states, noise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from dsd_fast.diffusion import noise
from dsd_fast.features.technique import Technique
from dsd_fast.models.controlnet import Control

if TYPE_CHECKING:
    from dsd_fast.models import Model
    from dsd_fast.models.prompts import PromptStates
    from dsd_fast.unet.adapters import AdapterScope

_TEXTS_KEPT = 7


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


class TextStates:
    """Text states of the prompts met last, so that techniques and chunks of images share the text encoder's work."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[tuple[object, ...], PromptStates] = {}

    def forget(self) -> None:
        """To be called at each request: the text encoders or their adapters may have changed since the last."""
        self._known = {}

    def of(self, prompts: Sequence[str] | None, scopes: Sequence[AdapterScope]) -> PromptStates:
        """States of M prompts, or of the absent one for None, on the model's device, under the encoders' adapters."""
        key = (None if prompts is None else tuple(prompts), tuple(scope.identity for scope in scopes))
        found = self._known.get(key)
        if found is None:
            with ExitStack() as entered, torch.no_grad():
                for scope in scopes:
                    entered.enter_context(scope.active())
                model = self._model
                found = model.encode_unconditional() if prompts is None else model.encode_prompts(prompts)
                found = found.to(model.device)
            # A pipeline's text encoders may have another type than its UNet.
            dtype = self._model.dtype
            pooled = None if found.pooled is None else found.pooled.to(dtype)
            found = replace(found, states=found.states.to(dtype), pooled=pooled)
            # The techniques of one chunk; the oldest goes first. A new dictionary, for other threads read the old one.
            self._known = {**dict([*self._known.items()][-_TEXTS_KEPT:]), key: found}
        return found


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
        return [self._condition(control) for control in controls]

    def _condition(self, control: Control) -> Tensor:
        if control.condition not in self._conditions:
            prepared = [control.prepare(picture_of(each), (each.shape[1], each.shape[2])) for each in self.pixels]
            self._conditions[control.condition] = torch.stack(prepared).to(self.latents.device, self.latents.dtype)
        return self._conditions[control.condition]


def draws_of_noise(seed: int, seeds: Sequence[int] | None, numbers: Sequence[int], draws: int, shape: Tensor) -> Tensor:
    """The noise of :class:`Inputs`, float32 on the CPU.

    Args:
        seed: of all images, unless there are ``seeds``, one for each image of the request.
        shape: latents (n, C, h, w) that it is for.

    Raises:
        ValueError: fewer seeds than images, or one that is no integer of 32 bits.
    """
    if not numbers:
        return torch.empty(0)
    if seeds is not None and max(numbers) >= len(seeds):
        raise ValueError(f"seeds: got {len(seeds)}, expected one per image")
    chosen = [seed] if seeds is None else [seeds[number] for number in numbers]
    size = shape.shape[1:]
    return torch.stack([torch.stack([noise(each, draw, size) for draw in range(draws)])[None] for each in chosen])


def picture_of(pixels: Tensor) -> Image.Image:
    """The 8-bit picture that :func:`dsd_fast.images.to_tensor` made the pixels from."""
    values = pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().cpu().numpy())
