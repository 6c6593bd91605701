"""Pictures of features: the first three principal components of each layer and timestep beside the image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dsd_fast.cli.images import decoding_error
from dsd_fast.cli.terminal import CommandError, printable
from dsd_fast.engine.items import prompt_check
from dsd_fast.features import FeatureExtractor, Moments
from dsd_fast.features.attention import KEY
from dsd_fast.features.pca import PCA, picture
from dsd_fast.images import ImageError, load_image
from dsd_fast.images.overlay import enlarged
from dsd_fast.jobs import replacing, storable

if TYPE_CHECKING:
    from dsd_fast.models import Model

FOLDER = "pictures"

NAMES = re.compile(r"\d{5,}\.png")
"""The names of the files that :func:`save` writes."""

_COLOURS = 3
_MARGIN, _LINE, _TEXT = 16, 22, 15
_PAPER, _INK, _PALE = (255, 255, 255), (30, 30, 30), (110, 110, 110)


@dataclass(frozen=True)
class Shown:
    """One image and the pictures of its features.

    Attributes:
        name: of the image, as it is written into results.
        image: as it is shown.
        rows: timestep → [picture of each layer], all of the image's size.
    """

    name: str
    image: Image.Image
    rows: dict[float, list[Image.Image]]


class Pictures:
    """Draws the features of a few images, with one PCA over them for each layer and timestep.

    The maps are drawn as the network has them, before any PCA, resizing, pooling or normalisation of the results, and
    averaged over draws.

    Args:
        extractor: whose settings hold.

    Attributes:
        model: the extractor's.
        layers: those that have a picture.
        timesteps: as the network is told them.

    Raises:
        CommandError: no layer has a picture.
    """

    def __init__(self, extractor: FeatureExtractor) -> None:
        config = extractor.config
        self.model = extractor.model
        # Maps of attention by head have no picture's shape.
        self.layers = tuple(name for name in extractor.layers if not name.endswith("-map"))
        if not self.layers:
            raise CommandError("--pictures: got layers that are attention maps by head alone, which have no picture")
        self._extractor = FeatureExtractor(
            extractor.model,
            [name for name in self.layers if name != KEY],
            config.timesteps,
            attention=config.attention if KEY in self.layers else (),
            official_timesteps=config.official_timesteps,
            draws=config.draws,
            image_size=config.image_size,
            dtype="float32",
            technique=extractor.technique,
            memory_budget=config.memory_budget,
        )
        self.timesteps = self._extractor.timesteps

    def draw(self, images: Sequence[Path], prompts: Sequence[str] | str, seed: int) -> Iterator[Shown]:
        """Draws the pictures of K images, in order; those that cannot be read are left out.

        Args:
            prompts: one, or one each.
        """
        # Twice through the network, so that no more than one image's features are in memory.
        moments = {(name, s): Moments() for name in self.layers for s in range(len(self.timesteps))}
        for _, features in self._features(images, prompts, seed):
            for (name, s), each in moments.items():
                each.add(features[name][s])
        found = {key: each.pca(_COLOURS) for key, each in moments.items()} if len(images) else {}
        small: dict[tuple[str, int], list[Tensor]] = {key: [] for key in found}
        numbers = []
        for number, features in self._features(images, prompts, seed):
            numbers.append(number)
            for (name, s), pca in found.items():
                small[name, s].append(pca.transform(features[name][s][None])[0].cpu())
        same = PCA(
            torch.zeros(_COLOURS, dtype=torch.float32, device="cpu"),
            torch.eye(_COLOURS, dtype=torch.float32, device="cpu"),
            torch.ones(_COLOURS, dtype=torch.float32, device="cpu"),
        )
        drawn = {key: picture(torch.stack(values), pca=same) for key, values in small.items() if values}
        for row, number in enumerate(numbers):
            shown = enlarged(load_image(images[number]))
            rows = {
                t: [_stretched(drawn[name, s][row], shown.size) for name in self.layers]
                for s, t in enumerate(self.timesteps)
            }
            yield Shown(storable(str(images[number])), shown, rows)

    def _features(
        self, images: Sequence[Path], prompts: Sequence[str] | str, seed: int
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for number, features in self._extractor.extract_iter(images, prompts, seed):
            if not isinstance(features, ImageError):
                yield number, features


def first_usable(
    model: Model, images: Sequence[Path], prompts: Sequence[str] | str, count: int
) -> tuple[list[int], list[Path], str | list[str]]:
    """Gives positions, paths and prompts of the first images that can be decoded and whose prompts are not too long."""
    check = prompt_check(model)

    def is_usable(number: int) -> bool:
        return (isinstance(prompts, str) or check(prompts[number]) is None) and not decoding_error(images[number])

    numbers = list(islice(filter(is_usable, range(len(images))), count))
    own = prompts if isinstance(prompts, str) else [prompts[number] for number in numbers]
    return numbers, [images[number] for number in numbers], own


def save(folder: Path, number: int, shown: Shown, layers: Sequence[str]) -> str:
    """Writes the pictures of an image as one PNG file, a row for each timestep; returns its name in the results."""
    name = f"{number:05d}.png"
    rows = [
        [(shown.image, printable(Path(shown.name).name)), *zip(row, layers, strict=True)] for row in shown.rows.values()
    ]
    with replacing(folder / name) as file:
        _sheet(rows, [f"t = {t}" for t in shown.rows]).save(file, "PNG")
    return f"{FOLDER}/{name}"


def _sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]], titles: Sequence[str]) -> Image.Image:
    """Pictures of one size in rows, each with a line below it, and a title above each row."""
    font = ImageFont.load_default(_TEXT)
    width, height = rows[0][0][0].size
    cell = max([width, *(round(font.getlength(label)) for row in rows for _, label in row)])
    down = height + 2 * _LINE + _MARGIN
    sheet = Image.new("RGB", (_MARGIN + len(rows[0]) * (cell + _MARGIN), len(rows) * down + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for y, (row, title) in enumerate(zip(rows, titles, strict=True)):
        top = _MARGIN + y * down
        draw.text((_MARGIN, top), title, _INK, font)
        for x, (tile, label) in enumerate(row):
            left = _MARGIN + x * (cell + _MARGIN)
            sheet.paste(tile, (left, top + _LINE))
            draw.text((left, top + _LINE + height + 2), label, _PALE, font)
    return sheet


def _stretched(pixels: object, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)  # type: ignore[arg-type]
