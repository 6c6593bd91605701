"""Texts and images of a model to what its UNet reads, and its latents to images, within a memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dsd_fast.engine.adapters import Adapters
from dsd_fast.engine.gradients import kept_bytes
from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.engine.texts import Texts
from dsd_fast.images import ImageSource, decode_chunks
from dsd_fast.kernels.common.transfer import Download, one_behind, upload
from dsd_fast.models.prompts import PromptStates
from dsd_fast.unet.stream import default_budget, gradient_budget

if TYPE_CHECKING:
    from dsd_fast.models import Model

Prompt = str | ImagePrompt
"""What stands for a text: itself, or one image."""

# Images in one call of the VAE, and its parts' peaks: so many float tensors of its first width at the image's size. The
# decoder's last block but one leaves twice that width, which is held beside its norm and the convolution of it.
_VAE_IMAGES = 8
_ENCODER_TENSORS = 6
_DECODER_TENSORS = 8
# Images that are decoded together.
_SOURCES_AT_ONCE = 32
# Requests whose text states are remembered: the techniques of one chunk of images.
_REMEMBERED = 7


class Encoding:
    """What an engine does beside the UNet: of text encoders, under its adapters, and of the VAE.

    Args:
        memory_budget: bytes; None: the device's default.

    Attributes:
        model, adapters: the engine's.
        memory_budget: as given.
        size, latent_size: the engine's.
    """

    model: Model
    adapters: Adapters
    size: tuple[int, int]
    latent_size: tuple[int, int]

    def __init__(self, memory_budget: int | None) -> None:
        self.memory_budget = memory_budget
        self._remembered: list[tuple[tuple[object, ...], PromptStates]] = []

    @property
    def memory(self) -> int:
        """The memory budget in bytes; the device's default where none was given."""
        return default_budget(self.model.device) if self.memory_budget is None else self.memory_budget

    def encode_prompts(
        self, prompts: Sequence[Prompt] | ImagePrompt | None, clip_skip: int | None = None
    ) -> PromptStates:
        """Encode M prompts, or the absent one for None, under the engine's adapters; no gradients of the encoders.

        Where all are images as prompts, with ``alpha`` 0, their states are as few as those.

        Args:
            prompts: texts, and images as prompts of one each; or M images as prompts.
            clip_skip: of the texts, see :meth:`dsd_fast.models.Model.encode_prompts`.

        Raises:
            ValueError: a prompt that is neither, or is longer than the encoder's limit; one of another model.
        """
        if isinstance(prompts, ImagePrompt):
            prompts.check(self.model)
            with torch.inference_mode(False):
                return prompts.states()
        images = {} if prompts is None else {n: each for n, each in enumerate(prompts) if isinstance(each, ImagePrompt)}
        if not images:
            # States are kept, and what is kept may meet gradients later.
            with self.adapters.active(texts_only=True), torch.inference_mode(False), torch.no_grad():
                if prompts is None:
                    return self.model.encode_unconditional()
                return self.model.encode_prompts(cast("Sequence[str]", prompts), clip_skip)
        texts = {n: each for n, each in enumerate(prompts or ()) if n not in images}
        parts = [self.encode_prompts(list(texts.values()), clip_skip)] if texts else []
        for image in images.values():
            if len(image) != 1:
                raise ValueError(f"prompts: got {image!r} among them, expected images as prompts of one each")
            parts.append(self.encode_prompts(image))
        order = torch.tensor([*texts, *images], dtype=torch.int64, device="cpu").argsort()
        return PromptStates.joined(parts)[order]

    def texts(
        self, prompts: Sequence[Prompt | None], clip_skip: Sequence[int | None] | None = None
    ) -> tuple[Texts, Tensor]:
        """Give the different ones of n prompts, and (n,) int64, the number of each; None is the absent prompt.

        States are in the UNet's type; those of texts met last are remembered. :meth:`forget` is to be called at each
        request: the encoders, or their adapters, may have changed since.

        Args:
            prompts: texts, and images as prompts of one each.
            clip_skip: one for each prompt; an image as a prompt has none.
        """
        skips = [None] * len(prompts) if clip_skip is None else clip_skip
        asked: list[tuple[int | None, Prompt] | None] = []
        images: dict[ImagePrompt, None] = {}
        by_skip: dict[int | None, dict[str, None]] = {}
        for prompt, skip in zip(prompts, skips, strict=True):
            if isinstance(prompt, ImagePrompt):
                images[prompt] = None
                asked.append((None, prompt))
            elif prompt is not None:
                by_skip.setdefault(skip, {})[prompt] = None
                asked.append((skip, prompt))
            else:
                asked.append(None)
        used: list[tuple[int | None, Prompt]] = [(skip, text) for skip, own in by_skip.items() for text in own]
        used += [(None, image) for image in images]
        place: dict[tuple[int | None, Prompt] | None, int] = {None: len(used)}
        place |= {each: number for number, each in enumerate(used)}
        numbers = torch.tensor([place[each] for each in asked], dtype=torch.int64, device="cpu")
        absent = self._remembered_states(None) if None in prompts else None
        by_skip = by_skip if by_skip or images else {None: {}}
        parts = [self._remembered_states(tuple(own), skip) for skip, own in by_skip.items()]
        if images:
            parts.append(self._own_states(self.encode_prompts(list(images))))
        return Texts(PromptStates.joined(parts), absent), numbers

    def _remembered_states(self, prompts: tuple[str, ...] | None, clip_skip: int | None = None) -> PromptStates:
        key = (prompts, clip_skip, self.adapters.of_texts)
        states = next((known for other, known in tuple(self._remembered) if other == key), None)
        if states is None:
            states = self._own_states(self.encode_prompts(prompts, clip_skip))
            # In one statement, for other threads read the list: the oldest goes.
            self._remembered[:] = [*self._remembered[-_REMEMBERED:], (key, states)]
        return states

    def _own_states(self, states: PromptStates) -> PromptStates:
        """On the UNet's device and in its type, which a pipeline's text encoders need not have."""
        device, dtype = self.model.device, self.model.dtype
        pooled = None if states.pooled is None else upload(states.pooled, device, dtype)
        return replace(states, states=upload(states.states, device, dtype), pooled=pooled)

    def forget(self) -> None:
        """Encode prompts anew from now on."""
        self._remembered.clear()

    def encode_sources(self, images: Iterable[ImageSource], digest: Any) -> Tensor:
        """Encode images as the VAE's clean latents (n, C, h, w) on the CPU; their pixels go into a digest of hashlib.

        Raises:
            ImageError: an image that cannot be used.
        """

        def begun() -> Iterator[tuple[None, Download]]:
            for _, pixels, errors in decode_chunks(images, self.size, _SOURCES_AT_ONCE):
                if errors:
                    raise errors[min(errors)]
                for image in pixels:
                    digest.update(image.numpy().tobytes())
                yield None, Download({"latents": self.encode_images(pixels)})

        return torch.cat([download.done()["latents"] for _, download in one_behind(begun())])

    def encode_images(self, pixels: Sequence[Tensor], generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Encode n images of (3, H, W) in [−1, 1] as (n, C, h, w) latents, a few at a time; no gradients.

        Args:
            generators: to draw from the posterior, one for each image; None takes its mean.
        """
        if not len(pixels):
            return torch.empty(0, dtype=torch.float32, device="cpu")
        at_once = self._vae_images(pixels[0][0].numel(), _ENCODER_TENSORS)
        parts = (slice(start, start + at_once) for start in range(0, len(pixels), at_once))
        with torch.no_grad():
            return torch.cat(
                [
                    self.model.encode_images(
                        torch.stack(list(pixels[part])),
                        generators is not None,
                        None if generators is None else list(generators[part]),
                    )
                    for part in parts
                ]
            )

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode (n, C, h, w) latents as (n, 3, H, W) pixels in [−1, 1], as many at a time as the budget holds.

        Differentiable, see :meth:`dsd_fast.models.Model.decode_latents`; all of it is then kept for the backward pass.
        Who wants that bounded goes backward by parts of :meth:`images_decoded` latents, from each part's own loss to
        its latents, and then once from those.
        """
        height, width = (side * self.model.vae_scale_factor for side in latents.shape[-2:])
        if not len(latents):
            return torch.empty(0, 3, height, width, dtype=self.model.dtype, device=latents.device)
        at_once = self._vae_images(height * width, _DECODER_TENSORS)
        return torch.cat([self.model.decode_latents(part) for part in torch.split(latents, at_once)])

    def images_decoded(self, size: tuple[int, int] | None = None) -> int:
        """Tell how many images are decoded together for a gradient, which a quarter of the memory budget is for.

        Args:
            size: (h, w) of the latents; the engine's own if None.
        """
        device = self.model.device
        row = torch.zeros(
            1, self.model.latent_channels, *(size or self.latent_size), dtype=self.model.dtype, device=device
        )
        kept = kept_bytes(lambda: self.model.decode_latents(row.requires_grad_()), self.model.vae)
        budget = gradient_budget(device) // 2 if self.memory_budget is None else self.memory_budget // 4
        return max(1, min(_VAE_IMAGES, budget // kept))

    def _vae_images(self, positions: int, tensors: int) -> int:
        """Images in one call of the VAE."""
        per_image: int = tensors * self.model.vae.config.block_out_channels[0] * positions * 4
        return max(1, min(_VAE_IMAGES, self.memory // per_image))
