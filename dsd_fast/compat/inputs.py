"""What an official call is given, images and texts, each distinct one once."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsd_fast.images import ImageSource, load_batch
from dsd_fast.jobs.files import replacing

if TYPE_CHECKING:
    from dsd_fast.models import Model
    from dsd_fast.models.prompts import PromptStates

# Half precision's rounding of 2·x − 1, and no more.
_SLACK = 1e-3


@dataclass(frozen=True)
class Pictures:
    """Distinct images, and which of them each given one is.

    Attributes:
        sources: m float32 tensors (3, height, width) in [−1, 1] on the CPU, or m sources for `load_batch`.
        of: (n,) int64.
        size: (height, width) in pixels.
    """

    sources: Sequence[Tensor] | Sequence[ImageSource]
    of: Tensor
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.sources)

    def pixels(self, numbers: Sequence[int]) -> Tensor:
        """(len(numbers), 3, height, width) float32 in [−1, 1]: the images of these numbers."""
        chosen: list[Any] = [self.sources[i] for i in numbers]
        if isinstance(chosen[0], Tensor):
            return torch.stack(chosen)
        return load_batch(chosen, self.size)

    def each(self) -> Pictures:
        """These images, equal ones apart."""
        sources: list[Any] = [self.sources[i] for i in self.of.tolist()]
        return replace(self, sources=sources, of=torch.arange(len(sources), device="cpu"))


def read_images(image: Any, model: Model, renormalize_nonnegative: bool) -> Pictures:
    """Tensors as they are, in [−1, 1]; Pillow images, paths and uint8 arrays resized to the model's size.

    Raises:
        ValueError: `image` is something else, or of a shape, type or range that does not fit.
    """
    if isinstance(image, Tensor):
        batch = image
    elif isinstance(image, (list, tuple)) and image and all(isinstance(one, Tensor) for one in image):
        if len({one.shape[-3:] for one in image}) > 1 or len({one.ndim for one in image}) > 1:
            raise ValueError(f"image: got tensors of shapes {[tuple(one.shape) for one in image]}, expected equal ones")
        batch = torch.cat(list(image)) if image[0].ndim == 4 else torch.stack(list(image))
    else:
        return _read_sources(image, model)
    pixels = _check_tensor(batch, model.vae_scale_factor)
    if float(pixels.min()) >= 0:
        if renormalize_nonnegative:
            pixels = 2 * pixels - 1
        else:
            warnings.warn(
                "image: no value is below 0. Tensors are in [-1, 1] here, and this one is taken so; if it is in "
                "[0, 1], give 2 * image - 1. renormalize_nonnegative=True guesses as the official code does.",
                UserWarning,
                stacklevel=4,
            )
    firsts, of = _distinct(_digest(one) for one in pixels)
    return Pictures([pixels[i] for i in firsts], of, (pixels.shape[2], pixels.shape[3]))


def _check_tensor(batch: Tensor, factor: int) -> Tensor:
    pixels = batch[None] if batch.ndim == 3 else batch
    shape = tuple(batch.shape)
    if (
        pixels.ndim != 4
        or pixels.shape[1] != 3
        or 0 in pixels.shape
        or pixels.shape[2] % factor
        or pixels.shape[3] % factor
    ):
        raise ValueError(
            f"image: got shape {shape}, expected ([B,] 3, height, width) with sides that are multiples of {factor}"
        )
    if not pixels.is_floating_point():
        raise ValueError(f"image: got a tensor of {pixels.dtype}, expected floating point in [-1, 1]")
    pixels = pixels.detach().to("cpu", torch.float32).contiguous()
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -1 - _SLACK and high <= 1 + _SLACK):
        raise ValueError(f"image: spans {low} to {high}, expected -1 to 1")
    return pixels


def _read_sources(image: Any, model: Model) -> Pictures:
    given = [image] if isinstance(image, (os.PathLike, Image.Image, np.ndarray)) else image
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(
            f"image: got {_kind(image)}, expected a tensor, a Pillow image, a path, a uint8 array, or a list"
        )
    for index, one in enumerate(given):
        if not isinstance(one, (os.PathLike, Image.Image)) and not (
            isinstance(one, np.ndarray) and one.dtype == np.uint8
        ):
            raise ValueError(
                f"image[{index}]: got {_kind(one)}, expected Pillow images, paths and uint8 arrays, or tensors alone"
            )
    firsts, of = _distinct(os.fspath(one) if isinstance(one, os.PathLike) else id(one) for one in given)
    return Pictures([given[i] for i in firsts], of, model.image_size)


@dataclass(frozen=True)
class Texts:
    """Distinct encoded texts, in host memory, and which of them each pair has: ``of`` is (B,) int64."""

    states: PromptStates
    of: Tensor


def read_prompt(model: Model, prompt: Any, prompt_embeds: Tensor | None) -> Texts:
    """The texts of B pairs.

    Raises:
        ValueError: none or both are given, or what is given does not fit.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("prompt, prompt_embeds: expected one of them")
    if prompt_embeds is not None:
        return _embedded(model, "prompt_embeds", prompt_embeds)
    return _written(model, "prompt", [prompt] if isinstance(prompt, str) else prompt)


def read_negative(model: Model, negative_prompt: Any, negative_prompt_embeds: Tensor | None, texts: Texts) -> Texts:
    """The texts of the unconditional rows of the B pairs with ``texts``: without a request the model's own, for all.

    Raises:
        ValueError: both are given, what is given does not fit, or the two rows' texts have different numbers of tokens.
    """
    pairs = len(texts.of)
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("negative_prompt, negative_prompt_embeds: expected one of them at most")
    if negative_prompt_embeds is not None:
        free = _embedded(model, "negative_prompt_embeds", negative_prompt_embeds)
    elif negative_prompt is None:
        free = Texts(model.encode_unconditional().to("cpu"), torch.zeros(1, dtype=torch.int64, device="cpu"))
    else:
        given = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        free = _written(model, "negative_prompt", given)
    if len(free.of) not in (1, pairs):
        name = "negative_prompt" if negative_prompt_embeds is None else "negative_prompt_embeds"
        raise ValueError(f"{name}: got {len(free.of)}, expected one, or one for each of {pairs} prompts")
    # Both go through the network side by side, which takes texts of one length.
    own, other = texts.states.states.shape[1], free.states.states.shape[1]
    if own != other and negative_prompt_embeds is not None:
        raise ValueError(f"negative_prompt_embeds: got {other} tokens, expected {own} as in the prompts")
    if own != other:
        raise ValueError(
            f"prompt_embeds: got {own} tokens, expected {other} as in the unconditional text; for another number give "
            f"negative_prompt_embeds of {own} tokens too"
        )
    return Texts(free.states, free.of.expand(pairs))


def _written(model: Model, name: str, prompts: Any) -> Texts:
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"{name}: got {_kind(prompts)}, expected a string or a list of strings")
    firsts, of = _distinct(prompts)
    try:
        return Texts(model.encode_prompts([prompts[i] for i in firsts]).to("cpu"), of)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _embedded(model: Model, name: str, embeds: Tensor) -> Texts:
    from dsd_fast.models.prompts import PromptStates

    if model.family == "sdxl":
        raise ValueError(f"{name}: SDXL needs pooled states too, for which the call has no argument; expected text")
    width = model.text_width
    if embeds.ndim != 3 or embeds.shape[-1] != width or 0 in embeds.shape or not embeds.is_floating_point():
        raise ValueError(f"{name}: got shape {tuple(embeds.shape)} of {embeds.dtype}, expected (B, tokens, {width})")
    states = embeds.detach().to("cpu", model.text_encoders[0].dtype)
    firsts, of = _distinct(_digest(one) for one in states)
    chosen = states[torch.tensor(firsts, device="cpu")]
    ids = torch.zeros(len(firsts), states.shape[1], dtype=torch.int64, device="cpu")
    return Texts(
        PromptStates(chosen, None, torch.full((len(firsts),), states.shape[1], dtype=torch.int64, device="cpu"), ids),
        of,
    )


def _distinct(keys: Iterable[Hashable]) -> tuple[list[int], Tensor]:
    """Positions of the first of each key, and for every key the number of its first."""
    number: dict[Hashable, int] = {}
    of = [number.setdefault(key, len(number)) for key in keys]
    firsts = {own: position for position, own in reversed(list(enumerate(of)))}
    return [firsts[own] for own in range(len(number))], torch.tensor(of, device="cpu")


def _digest(values: Tensor) -> bytes:
    """A key of one shape's values, the same for equal bits alone."""
    return hashlib.blake2b(values.contiguous().view(torch.uint8).numpy().data, digest_size=32).digest()


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return f"{len(value)} values" if isinstance(value, (list, tuple)) else type(value).__name__


def write_jpeg(file: Path, image: Image.Image) -> None:
    """Write a picture as Pillow does by itself, whole or not at all; the folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    image.save(content, "JPEG")
    with replacing(file) as stream:
        stream.write(content.getvalue())
