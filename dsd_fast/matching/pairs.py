"""Pairs in any order through a scorer: every image, text and pair once, the pairs of an image side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsd_fast.engine import Prompt, Texts
from dsd_fast.images import ImageError, ImageSource, Taken, take
from dsd_fast.kernels.common.transfer import one_behind
from dsd_fast.matching.score import PairScorer, TermsBehind


class Pairs:
    """Different images, texts and pairs of them, numbered as they come.

    Attributes:
        images, texts: each once.
    """

    def __init__(self) -> None:
        self.images: list[ImageSource] = []
        self.texts: list[Prompt] = []
        self._image_numbers: dict[Any, int] = {}
        self._text_numbers: dict[Prompt, int] = {}
        self._pairs: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        """Count the different pairs."""
        return len(self._pairs)

    def image(self, image: ImageSource) -> int:
        """Number an image; a file, an object, or what was taken of objects with equal contents, has one number."""
        number = self._image_numbers.setdefault(image_key(image), len(self.images))
        if number == len(self.images):
            self.images.append(image)
        return number

    def text(self, text: Prompt) -> int:
        """Number a text, or an image as a prompt, which is known by its content."""
        number = self._text_numbers.setdefault(text, len(self.texts))
        if number == len(self.texts):
            self.texts.append(text)
        return number

    def pair(self, image: ImageSource, text: Prompt) -> int:
        """Number a pair."""
        return self._pairs.setdefault((self.image(image), self.text(text)), len(self._pairs))

    def scored(
        self, scorer: PairScorer, texts: Texts, *, strict: bool = False
    ) -> Iterator[tuple[int, Tensor, Tensor, dict[int, ImageError]]]:
        """Score a few images at a time, in their order.

        Args:
            texts: :attr:`texts`, encoded.
            strict: raise the error of an image that cannot be used before the images beside it are scored.

        Yields:
            (how many images are done, numbers (b,) of pairs, their attention and noise parts (2, b) float64 on the CPU,
            and the errors of images that cannot be used, whose pairs are missing).
        """
        if not self._pairs:
            return
        image_of, text_of = torch.tensor(list(self._pairs), device="cpu").unbind(1)
        pairs_of = side_by_side(image_of)

        def begun() -> Iterator[tuple[tuple[int, Tensor, dict[int, ImageError]], TermsBehind]]:
            done = 0
            for numbers, latents, errors in scorer.latents(self.images, texts, -(-len(self) // len(self.images))):
                if strict and errors:
                    raise errors[min(errors)]
                first, done = done, done + len(numbers) + len(errors)
                chosen = pairs_of(first, done)
                # An image that failed has no latent.
                place = torch.full((done - first,), -1, dtype=torch.int64, device="cpu")
                usable = torch.tensor(numbers, dtype=torch.int64, device="cpu") - first
                place[usable] = torch.arange(len(numbers), device="cpu")
                places = place[image_of[chosen] - first]
                chosen, places = chosen[places >= 0], places[places >= 0]
                yield (done, chosen, errors), scorer.begin(latents, texts, places, text_of[chosen])

        for (done, chosen, errors), terms in one_behind(begun()):
            yield done, chosen, torch.stack(scorer.parts(terms.done())), errors


def side_by_side(image_of: Tensor) -> Callable[[int, int], Tensor]:
    """Make of (B,) numbers of images a function to the pairs of the images first … last − 1, image by image."""
    ordered, order = torch.sort(image_of, stable=True)

    def pairs_of(first: int, last: int) -> Tensor:
        low, high = torch.searchsorted(ordered, torch.tensor([first, last], device="cpu")).tolist()
        return order[low:high]

    return pairs_of


def image_key(image: ImageSource) -> Any:
    """Give a key that is equal for one file, for one object, or for equal contents that were taken of objects.

    An object itself is one of a list that holds it: one that is drawn is filled again, or its place in memory is.
    """
    if isinstance(image, Taken):
        return image.key
    return os.fspath(image) if isinstance(image, os.PathLike) else id(image)


def taken_pair(pair: tuple[ImageSource, Prompt]) -> tuple[ImageSource, Prompt]:
    """Take the image of a pair, see :func:`~dsd_fast.images.take`."""
    image, text = pair
    return take(image), text
