"""Options of data sets that several commands share, and the groups that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dsd_fast.matching import Group

DATA_PANEL = "Data"

Data = Annotated[Path, typer.Argument(help="A data file, or the folder of RefCOCOg.", show_default=False)]
Format = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=DATA_PANEL,
        metavar="NAME",
        help="comvg, vqa, vqa-binary, refcocog, winoground, jsonl, csv or parquet; told by the file if none.",
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(rich_help_panel=DATA_PANEL, metavar="DIR", help="Folder of the images; the data file's if none."),
]
ImageName = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=DATA_PANEL, metavar="TEMPLATE", help="Image file names from ids; the format's own if none."
    ),
]
NegativesSeed = Annotated[
    int, typer.Option(rich_help_panel=DATA_PANEL, help="Of the negatives, where the format draws them.")
]
Limit = Annotated[int | None, typer.Option(rich_help_panel=DATA_PANEL, min=1, help="The first groups alone.")]


def read_data(
    data: Path,
    format: str | None,
    images: Path | None,
    image_name: str | None,
    negatives_seed: int,
    split: str | None,
    limit: int | None,
) -> list[Group]:
    """The groups that a command's options ask for.

    Raises:
        CommandError: a part of a data set that has no name.
        ValueError: as :func:`dsd_fast.read_groups` and :func:`dsd_fast.matching.official_split`.
    """
    from dsd_fast.cli.terminal import CommandError
    from dsd_fast.matching.datasets import official_split, read_groups

    if split is not None and format is None:
        raise CommandError("--official-split depends on the data set: give --format too")
    # A part is one of all groups, whatever the limit.
    first = limit if split is None else None
    groups = read_groups(data, format, images=images, image_name=image_name, seed=negatives_seed, limit=first)
    if split is not None:
        assert format is not None
        groups = official_split(groups, format, split)
    return groups[:limit]
