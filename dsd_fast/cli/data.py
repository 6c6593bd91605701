"""Options of data sets that several commands share, and the groups that they stand for."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsd_fast.cli.groups import Options
from dsd_fast.cli.terminal import CommandError

if TYPE_CHECKING:
    from dsd_fast.matching import Group


class DataOptions(Options, panel="Data"):
    """A data set, and which of its groups are taken; each command says what its `official_split` takes."""

    data: Annotated[Path, typer.Argument(help="A data file, or the folder of RefCOCOg.", show_default=False)]
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="comvg, vqa, vqa-binary, refcocog, winoground, jsonl, csv or parquet; told by the file if none.",
        ),
    ] = None
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the images; the data file's if none.")
    ] = None
    image_name: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="Image file names from ids; the format's own if none.")
    ] = None
    negatives_seed: Annotated[int, typer.Option(help="Of the negatives, where the format draws them.")] = 0
    official_split: str | bool | None = None
    limit: Annotated[int | None, typer.Option(min=1, help="The first groups alone.")] = None

    def groups(self) -> "list[Group]":
        """Reads the groups that the options ask for.

        Raises:
            CommandError: a part of a data set that has no name.
            ValueError: as :func:`dsd_fast.read_groups` and :func:`dsd_fast.matching.official_split`.
        """
        from dsd_fast.matching.datasets import official_split, read_groups

        split = self.official_split
        part = split if isinstance(split, str) else "train" if split else None
        if part is not None and self.format is None:
            raise CommandError("--official-split depends on the data set: give --format too")
        # A part is one of all groups, whatever the limit.
        first = self.limit if part is None else None
        groups = read_groups(
            self.data,
            self.format,
            images=self.images,
            image_name=self.image_name,
            seed=self.negatives_seed,
            limit=first,
        )
        if part is not None:
            assert self.format is not None
            groups = official_split(groups, self.format, part)
        return groups[: self.limit]

    def settings(self) -> dict[str, Any]:
        """Tells the options by name, for a file of results."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
