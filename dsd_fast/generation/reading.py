"""Rows from texts, mappings, tables and files of prompts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dsd_fast.engine import ImagePrompt
from dsd_fast.engine.encoding import Prompt
from dsd_fast.generation.rows import GenerateRow, check_seed
from dsd_fast.jobs import tables
from dsd_fast.jobs.tables import SUFFIXES, Row, image_path, read_lines

Seeds = int | Sequence[int]
_Prompt = Prompt | Mapping[str, Any] | GenerateRow
Prompts = _Prompt | os.PathLike[str] | Iterable[_Prompt]

COLUMNS = (
    "prompt", "seed", "negative_prompt", "height", "width", "steps", "guidance", "guidance_rescale", "clip_skip",
    "image", "strength", "conditions", "adapter", "original_size", "crop", "target_size", "label", "cls", "name",
)  # fmt: skip
"""Of a table: the fields of a row, its size as height and width."""

ALIASES = {
    "guidance_scale": "guidance",
    "num_inference_steps": "steps",
    "crops_coords_top_left": "crop",
    "control_image": "conditions",
    "class": "label",
}
"""What diffusers' pipelines, and tables for them, call these."""

_INTEGERS = ("seed", "height", "width", "steps", "clip_skip", "cls")
_NUMBERS = ("guidance", "guidance_rescale", "strength")
_PAIRS = ("original_size", "crop", "target_size")
_NAMES = ("label", "name")


def rows_of(prompts: Prompts, seeds: Seeds | None = None) -> Iterator[GenerateRow]:
    """Gives the rows of what a caller asks for, one by one.

    Args:
        prompts: a text or texts; images as prompts, whose rows have their names; a row or rows, each a
            :class:`GenerateRow` or a mapping of its fields (the size also as height and width, and the names of
            :data:`ALIASES`); or a `pathlib.Path`, see :func:`read_rows`. Consumed as they are asked for.
        seeds: one for all, or one for each prompt, as diffusers' list of generators; one text, or image as a prompt, by
            itself is a row for each of them. (Each prompt with each seed: :func:`~dsd_fast.generation.grids.grid`, and
            the command.) None: what the row says, or 0. A row that says its own takes no other.

    Raises:
        ValueError: something else, a row that says what there is not or no prompt, or a seed of its own beside
            ``seeds``, by its number; another number of seeds than of prompts, at once where theirs is known.
    """
    chosen = check_seeds(seeds)
    own = None if _is_one(seeds) else chosen
    if isinstance(prompts, os.PathLike):
        return _of_file(Path(prompts), _Seeds(chosen, own is not None), None, ())
    if isinstance(prompts, str) or (isinstance(prompts, ImagePrompt) and len(prompts) == 1):
        return _rows([prompts], _Seeds(chosen))
    if isinstance(prompts, Mapping | GenerateRow):
        prompts = [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable) or hasattr(prompts, "columns"):
        raise ValueError(
            f"prompts: got one {type(prompts).__name__}, expected a text, rows (of a data frame its records, as "
            "mappings), images as prompts, or the pathlib.Path of a table or a file of prompts"
        )
    if own and isinstance(prompts, Sequence | ImagePrompt) and len(prompts) != len(own):
        raise _other_number(own, len(prompts))
    return _rows(prompts, _Seeds(chosen, own is not None))


def read_rows(
    file: str | os.PathLike[str],
    seeds: Seeds | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    ignore: Collection[str] = (),
) -> Iterator[GenerateRow]:
    """Reads rows from a table or a file of prompts, one by one; memory does not grow with it.

    A table is CSV (UTF-8), JSON lines (.jsonl, .ndjson) or Parquet, with a column ``prompt`` and any of
    :data:`COLUMNS` and :data:`ALIASES`. A cell without a value leaves the field to the configuration; the empty text is
    a prompt, and save in a CSV a negative prompt too. ``original_size``, ``crop`` and ``target_size`` are lists of two
    numbers, ``conditions`` and ``adapter`` one name or a list; a list in a CSV is JSON. Images are names of files,
    relative to ``images``, which they cannot leave by ".."; absolute names stand as they are, a URL is an error.

    A file of prompts (.txt) has one a line, without the white space around it; blank lines are left out.

    Args:
        file: the file.
        seeds: a row for each prompt and each of these, seed after seed; None: what the row says, or 0.
        images: folder of the images; None: the file's.
        ignore: columns that are left out. Others that a row does not know are an error: a misspelt one would be
            silently as if it were not there.

    Raises:
        ValueError: the file cannot be read or has no rows, or something in it is wrong, by line (row in Parquet) and
            column.
    """
    return _of_file(Path(file), _Seeds(check_seeds(seeds)), images, ignore)


def check_seeds(seeds: Seeds | None) -> range | tuple[int, ...] | None:
    """Seeds as a sequence; None of None. What a long range says is not written out.

    Raises:
        ValueError: none, or one that is none.
    """
    if seeds is None:
        return None
    several: Any = (seeds,) if _is_one(seeds) else seeds
    given: range | tuple[int, ...]
    try:
        if isinstance(several, str | bytes | Mapping) or not hasattr(several, "__getitem__"):
            raise TypeError
        if isinstance(several, range):
            given = several
            # Whatever lies between them is a seed too.
            list(map(check_seed, (given[0], given[-1]) if given else ()))
        else:
            given = tuple(map(check_seed, several))
    except (TypeError, ValueError):
        raise ValueError(
            f"seeds: got {repr(seeds)[:80]}, expected an integer from 0 to 2**64 - 1, or several"
        ) from None
    if not given:
        raise ValueError("seeds: got none, expected at least one")
    return given


def _is_one(seeds: Any) -> bool:
    return isinstance(seeds, int | np.integer)


@dataclass(frozen=True)
class _Seeds:
    """The seeds of prompts, all of them of each, or one each; of None the rows say their own."""

    seeds: Sequence[int] | None
    one_each: bool = False

    def of(self, number: int) -> Sequence[int] | None:
        """Those of a prompt, by its position."""
        if self.seeds is None or not self.one_each:
            return self.seeds
        if number >= len(self.seeds):
            raise _other_number(self.seeds, "more")
        return (self.seeds[number],)

    def end(self, count: int) -> None:
        """Refuses another number of prompts."""
        if self.seeds is not None and self.one_each and len(self.seeds) != count:
            raise _other_number(self.seeds, count)


def _other_number(seeds: Sequence[int], prompts: int | str) -> ValueError:
    return ValueError(f"seeds: got {len(seeds)} for {prompts} prompts, expected one each, or one for all")


@dataclass(frozen=True)
class _Said:
    """What a caller or a table says of one prompt: field → value, and column → field."""

    place: str
    values: Mapping[str, Any]
    named: Mapping[str, str] = field(default_factory=dict)

    def row(self, has_seed: bool) -> GenerateRow:
        """The row, whose seed is told elsewhere where ``has_seed`` is set."""
        said = {name: value for name, value in self.values.items() if value is not None}
        if "prompt" not in said:
            raise ValueError(f"{self.place}, column 'prompt': the value is missing")
        if has_seed and "seed" in said:
            raise ValueError(f"{self.place} has a seed, and seeds are given too; expected one of them")
        sides = [side for side in ("height", "width") if side in said]
        if len(sides) == 1 or (sides and "size" in said):
            wrong = "alone" if len(sides) == 1 else "and size"
            raise ValueError(f"{self.place}: got {sides[0]} {wrong}, expected height and width")
        if sides:
            said["size"] = (said.pop("height"), said.pop("width"))
        prompt = said["prompt"]
        try:
            return GenerateRow(**({"name": prompt.name} if isinstance(prompt, ImagePrompt) else {}) | said)
        except ValueError as error:
            name, _, rest = str(error).partition(": ")
            column = next((column for column, meant in self.named.items() if meant == name), None)
            where = f", column {column!r}: {rest}" if column else f": {error}"
            raise ValueError(self.place + where) from None


def _of_file(
    path: Path, seeds: _Seeds, images: str | os.PathLike[str] | None, ignore: Collection[str]
) -> Iterator[GenerateRow]:
    suffix = path.suffix.lower()
    if suffix not in (".txt", *SUFFIXES):
        raise ValueError(f"{path} ends in {suffix!r}, expected .txt (a prompt a line) or one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if suffix == ".txt":
        found: Iterator[Row] = (Row(f"{path}, line {number}", {"prompt": line}) for number, line in read_lines(path))
    else:
        found = tables.read_rows(path, SUFFIXES[suffix])
    folder = path.parent if images is None else Path(images)
    return _some(path, _made((_said(row, folder, frozenset(ignore)) for row in found), seeds))


def _some(file: Path, rows: Iterator[GenerateRow]) -> Iterator[GenerateRow]:
    row = None
    for row in rows:
        yield row
    if row is None:
        raise ValueError(f"{file} has no rows")


def _rows(prompts: Iterable[Any], seeds: _Seeds) -> Iterator[GenerateRow]:
    return _made((_given(prompt, f"prompts[{number}]") for number, prompt in enumerate(prompts)), seeds)


def _made(given: Iterable[_Said | GenerateRow], seeds: _Seeds) -> Iterator[GenerateRow]:
    count = 0
    for number, each in enumerate(given):
        own, count = seeds.of(number), number + 1
        if isinstance(each, GenerateRow) and own is not None:
            raise ValueError(f"prompts[{number}] is a GenerateRow, which has a seed, and seeds are given too")
        row = each if isinstance(each, GenerateRow) else each.row(own is not None)
        if own is None:
            yield row
        else:
            yield from (replace(row, seed=seed) for seed in own)
    seeds.end(count)


def _given(prompt: Any, place: str) -> _Said | GenerateRow:
    """A prompt of a caller."""
    if isinstance(prompt, GenerateRow):
        return prompt
    if isinstance(prompt, str | ImagePrompt):
        return _Said(place, {"prompt": prompt})
    if not isinstance(prompt, Mapping):
        raise ValueError(
            f"{place}: got {repr(prompt)[:80]}, expected a text, an image as a prompt, a mapping or a GenerateRow"
        )
    named = _fields(prompt, place, more="size")
    return _Said(place, {named[column]: value for column, value in prompt.items()}, named)


def _said(row: Row, folder: Path, ignore: frozenset[str]) -> _Said:
    """A prompt of a table."""
    named = _fields(row.values, row.place, ignore)
    values = {
        name: _value(row, column, name, folder)
        for column, name in named.items()
        if row.has(column) or (row.values[column] == "" and _may_be_empty(name, row.is_csv))
    }
    return _Said(row.place, values, named)


def _may_be_empty(field: str, is_csv: bool) -> bool:
    return field == "prompt" or (field == "negative_prompt" and not is_csv)


def _value(row: Row, column: str, field: str, folder: Path) -> Any:
    """What a cell of a table says, as far as its kind tells; the row checks the rest."""
    value = row.values[column]
    if field in _INTEGERS:
        if isinstance(value, bool) or str(value).strip().lower() in ("true", "false"):
            raise row.wrong(column, "a whole number")
        return row.integer(column)
    if field in _NUMBERS:
        return row.number(column)
    if field in _PAIRS:
        return row.items(column)
    if field in _NAMES:
        return row.name(column)
    if field == "image":
        return image_path(folder, row.text(column), f"{row.place}, column {column!r}")
    if field in ("conditions", "adapter"):
        is_one = isinstance(value, str) and not (row.is_csv and value.lstrip().startswith("["))
        items = [value] if is_one else row.items(column)
        if not all(map(tables.is_text, items)):
            raise row.wrong(column, "one name or a list of names")
        return items if field == "adapter" else [image_path(folder, item, row.place) for item in items]
    return value


def _fields(names: Iterable[str], place: str, ignore: frozenset[str] = frozenset(), more: str = "") -> dict[str, str]:
    """Column → field, of those that are not left out."""
    try:
        return _known(tuple(names), ignore, more)
    except ValueError as error:
        raise ValueError(f"{place}{error}") from None


# All rows of a table have the same columns.
@lru_cache(64)
def _known(names: tuple[str, ...], ignore: frozenset[str], more: str) -> dict[str, str]:
    known = [*COLUMNS, *ALIASES, *filter(None, [more])]
    found: dict[str, str] = {}
    for name in names:
        if name in ignore:
            continue
        if name not in known:
            like = difflib.get_close_matches(str(name).lower(), known, 1)
            raise ValueError(
                f", column {str(name)[:80]!r}: no row has this"
                + (f"; {like[0]!r} may be meant" if like else "")
                + f"; expected some of {', '.join(known)}, and others named in ignore="
            )
        meant = ALIASES.get(name, name)
        if meant in found.values():
            raise ValueError(
                f": the columns {next(each for each in found if found[each] == meant)} and {name} both say {meant}"
            )
        found[name] = meant
    return found
