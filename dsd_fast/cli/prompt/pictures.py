"""Images and, beside each, its variations: pictures of the prompts that were made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dsd_fast.cli.files import replacing_files
from dsd_fast.cli.sheets import read_lines, sheet, small
from dsd_fast.cli.terminal import progress
from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.generation.config import GenerateConfig
from dsd_fast.generation.export import generate_to
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.generation.sampler import Sampler
from dsd_fast.images import ImageError, load_image
from dsd_fast.jobs import index_shards
from dsd_fast.models import Model

SHEETS, IMAGES = "pictures", "images"
"""Folders beside the prompts: a sheet of each image, and the variations that they are made of."""

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


def make_variations(model: Model, prompts: ImagePrompt, config: GenerateConfig, count: int, folder: Path) -> None:
    """Makes `count` images of each prompt, with the seeds 0, 1, …, as a job in `folder`; what is there stays.

    Raises:
        JobError: the folder has other images, or cannot be written.
    """
    rows = (
        GenerateRow(prompt, seed, name=_row(number), label=prompts.names[number])
        for number, prompt in enumerate(prompts)
        for seed in range(count)
    )
    total = count * len(prompts)
    with progress("images") as display:
        task = display.add_task("pictures", total=total, units=0)

        def show(done: int) -> None:
            display.update(task, completed=done, units=done)

        generate_to(Sampler(model, config), rows, folder, layout="folder", closes=False, progress=show)
        show(total)


def write_sheets(
    out: Path, images: Sequence[Path], names: Sequence[str], texts: Sequence[str], count: int, sides: Sequence[str]
) -> Iterator[Sheet]:
    """Writes a sheet of each image into `out`, in place of earlier ones, and gives them.

    Args:
        images, names, texts: of the prompts.
        count: variations of each.
        sides: folders in `out` of :func:`make_variations`, a line of a sheet for each.
    """
    made = [_variations(out / side) for side in sides]
    with replacing_files(out / SHEETS, _NAMES) as folder:
        for number, (path, name, text) in enumerate(zip(images, names, texts, strict=True)):
            reference, lines = _reference(path), list[list[Image.Image | None]]()
            for side, ids in zip(sides, made, strict=True):
                (line,) = read_lines(out / side, [[ids.get((_row(number), seed)) for seed in range(count)]])
                lines.append([reference, *line])
            whole = sheet(lines)
            whole.save(folder / f"{_row(number)}.png")
            yield Sheet(name, text, whole)


def _reference(path: Path) -> Image.Image | None:
    try:
        return small(load_image(path))
    except ImageError:
        # It may have gone since.
        return None


def _row(number: int) -> str:
    return f"{number:05d}"


def _variations(folder: Path) -> Mapping[tuple[str, int], str]:
    ids: dict[tuple[str, int], str] = {}
    for table in index_shards(folder, ["id", "name", "seed", "status"]):
        ids |= {(row["name"], row["seed"]): row["id"] for row in table.to_pylist() if row["status"] == "ok"}
    return ids
