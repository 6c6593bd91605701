"""Pictures of classes without and with their tokens, from the same noise, and a sheet of them for each class."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dsd_fast.class_tokens import TokenConfig
from dsd_fast.class_tokens.prompts import Prompts
from dsd_fast.cli.files import replacing_files
from dsd_fast.cli.sheets import sheet, small
from dsd_fast.engine import LearnedTokens
from dsd_fast.generation.config import GenerateConfig
from dsd_fast.generation.export import generate_to
from dsd_fast.generation.files import read_images
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.generation.sampler import Sampler
from dsd_fast.jobs import index_shards
from dsd_fast.models import Model

SHEETS, IMAGES = "pictures", "images"
"""Folders beside the tokens: a sheet of each class, and the images that they are made of."""


@dataclass(frozen=True)
class Sheet:
    """Pictures of a class.

    Attributes:
        token: of the class.
        picture: a column for each seed, the plain text above, the text with the token below.
        plain, learned: those texts.
    """

    token: str
    picture: Image.Image
    plain: str
    learned: str


def make_images(
    model: Model,
    tokens: LearnedTokens,
    config: TokenConfig,
    count: int,
    out: Path,
    progress: Callable[[int], None],
) -> None:
    """Makes the images, `count` of each text, as a job in `out`, sampled as in learning; what is there stays.

    Raises:
        JobError: the folder has other images, or cannot be written.
    """
    settings = GenerateConfig(
        steps=config.steps,
        guidance=config.guidance,
        scheduler=config.scheduler,
        image_size=config.image_size,
        adapter=config.adapter,
        memory_budget=config.memory_budget,
    )
    rows = (
        GenerateRow(text, seed, label=tokens.classes[token])
        for token, texts in texts_of(tokens, config).items()
        for text in texts
        for seed in range(count)
    )
    sampler = Sampler(model.with_tokens(tokens), settings)
    generate_to(sampler, rows, out / IMAGES, layout="folder", closes=False, progress=progress)


def texts_of(tokens: LearnedTokens, config: TokenConfig) -> dict[str, tuple[str, str]]:
    """Gives each token's texts by the first template: the plain one, of the class's name alone, and its own."""
    prompts = Prompts(list(tokens.classes.values()), config)
    return {token: (prompts.plain(n)[0], prompts.every(n)[0]) for n, token in enumerate(prompts.tokens)}


def write_sheets(tokens: LearnedTokens, config: TokenConfig, count: int, out: Path) -> Iterator[Sheet]:
    """Writes each class's sheet as a file of its token's name, in place of earlier ones, and gives them."""
    ids: dict[tuple[str, int], str] = {}
    for table in index_shards(out / IMAGES, ["id", "prompt", "seed", "status"]):
        ids |= {(row["prompt"], row["seed"]): row["id"] for row in table.to_pylist() if row["status"] == "ok"}
    files = tokens.files()
    with replacing_files(out / SHEETS, re.compile(r".*\.png")) as folder:
        for token, texts in texts_of(tokens, config).items():
            lines = [[ids.get((text, seed)) for seed in range(count)] for text in texts]
            pictures = _pictures(out, [name for line in lines for name in line if name is not None])
            # An image that could not be made leaves its place empty.
            picture = sheet([[pictures.get(name) for name in line] for line in lines])
            picture.save(folder / Path(files[token]).with_suffix(".png"))
            yield Sheet(token, picture, *texts)


def _pictures(out: Path, ids: Sequence[str]) -> Mapping[str | None, Image.Image]:
    pictures: dict[str | None, Image.Image] = {}
    for name, (content, _) in zip(ids, read_images(out / IMAGES, ids), strict=True):
        with Image.open(io.BytesIO(content)) as image:
            pictures[name] = small(image)
    return pictures
