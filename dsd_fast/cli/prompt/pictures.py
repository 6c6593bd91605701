"""Images and, beside each, its variations: pictures of the prompts that were made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from dsd_fast.cli.files import replacing_files
from dsd_fast.cli.sheets import sheet, small
from dsd_fast.cli.terminal import progress
from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.generation.config import GenerateConfig
from dsd_fast.generation.generate import generate
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.images import ImageError, load_image
from dsd_fast.models import Model

FOLDER = "pictures"
"""Beside the prompts, with a sheet of each image."""

_NAMES = re.compile(r"\d{5,}\.png")


@dataclass(frozen=True)
class Sheet:
    """An image and its variations.

    Attributes:
        name: of the image.
        text: that it stands in.
        picture: the image, and beside it a column for each seed; a line for each side.
    """

    name: str
    text: str
    picture: Image.Image


def write_sheets(
    out: Path,
    images: Sequence[Path],
    texts: Sequence[str],
    sides: Sequence[tuple[Model, ImagePrompt]],
    config: GenerateConfig,
    count: int,
) -> Iterator[Sheet]:
    """Makes variations and writes a sheet of each image into `out`, in place of earlier ones; gives them.

    Args:
        images, texts: of the prompts.
        sides: models with prompts of all images, a line of a sheet for each.
        config: of the variations.
        count: of each prompt, with the seeds 0, 1, ….
    """
    made = [
        generate(model, (GenerateRow(prompt, seed) for prompt in prompts for seed in range(count)), config)
        for model, prompts in sides
    ]
    names = sides[0][1].names
    with replacing_files(out / FOLDER, _NAMES) as folder, progress("images") as display:
        task = display.add_task("pictures", total=count * len(made) * len(images), units=0)
        for number, (path, name, text) in enumerate(zip(images, names, texts, strict=True)):
            reference = _reference(path)
            lines = [[reference, *map(small, islice(pictures, count))] for pictures in made]
            whole = sheet(lines)
            whole.save(folder / f"{number:05d}.png")
            done = count * len(made) * (number + 1)
            display.update(task, completed=done, units=done)
            yield Sheet(name, text, whole)


def _reference(path: Path) -> Image.Image | None:
    try:
        return small(load_image(path))
    except ImageError:
        # It may have gone since.
        return None
