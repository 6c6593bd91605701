"""Rows from texts, mappings, tables, files of prompts, and grids of templates, classes and seeds."""

from __future__ import annotations

import difflib
import os
import string
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsd_fast.generation.rows import GenerateRow, check_seed
from dsd_fast.jobs import tables
from dsd_fast.jobs.tables import SUFFIXES, Row, image_path, read_lines

Seeds = int | Sequence[int]
_Prompt = str | Mapping[str, Any] | GenerateRow
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
    """Gives the rows of what a caller asks for, one by one: a row for each prompt and each seed, seed after seed.

    Args:
        prompts: a text or texts; a row or rows, each a :class:`GenerateRow` or a mapping of its fields (the size also
            as height and width, and the names of :data:`ALIASES`); or a `pathlib.Path`, see :func:`read_rows`.
            Consumed as they are asked for.
        seeds: of each prompt, one or several; None: 0, or what the row says. A row that says its own takes no others.

    Raises:
        ValueError: something else, a row that says what there is not or no prompt, or a seed of its own beside
            ``seeds``, by its number.
    """
    chosen = check_seeds(seeds)
    if isinstance(prompts, os.PathLike):
        return read_rows(prompts, seeds)
    if isinstance(prompts, str | Mapping | GenerateRow):
        prompts = [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable) or hasattr(prompts, "columns"):
        raise ValueError(
            f"prompts: got one {type(prompts).__name__}, expected a text, rows (of a data frame its records, as "
            "mappings), or the pathlib.Path of a table or a file of prompts"
        )
    return _rows(prompts, chosen)


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
        seeds: as in :func:`rows_of`.
        images: folder of the images; None: the file's.
        ignore: columns that are left out. Others that a row does not know are an error: a misspelt one would be
            silently as if it were not there.

    Raises:
        ValueError: the file cannot be read or has no rows, or something in it is wrong, by line (row in Parquet) and
            column.
    """
    path, chosen = Path(file), check_seeds(seeds)
    suffix = path.suffix.lower()
    if suffix not in (".txt", *SUFFIXES):
        raise ValueError(f"{path} ends in {suffix!r}, expected .txt (a prompt a line) or one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if suffix == ".txt":
        return _some(path, (row for _, line in read_lines(path) for row in _seeded({"prompt": line}, chosen)))
    folder = path.parent if images is None else Path(images)
    found = tables.read_rows(path, SUFFIXES[suffix])
    return _some(path, (row for each in found for row in _table_rows(each, folder, frozenset(ignore), chosen)))


def grid(
    templates: str | Sequence[str], classes: Sequence[str] | os.PathLike[str], seeds: Seeds = 0
) -> Iterator[GenerateRow]:
    """Gives a row for each class, template and seed, in this order, the seeds innermost.

    Args:
        templates: texts as "a photo of a {}", the class in the place of the one "{}" or "{class}"; "{{" and "}}" stand
            for braces.
        classes: names, or the `pathlib.Path` of a file of one a line. A row's ``cls`` is its class's position.
        seeds: one or several, the same for each class.

    Raises:
        ValueError: a template without such a place, or with others; no class, an empty one, or one that is there twice;
            no seeds.
    """
    texts = check_templates(templates)
    names = read_classes(classes)
    chosen = check_seeds(seeds) or (0,)
    return (
        GenerateRow(filled(text, name), seed, label=name, cls=number)
        for number, name in enumerate(names)
        for text in texts
        for seed in chosen
    )


def read_classes(classes: Sequence[str] | os.PathLike[str]) -> list[str]:
    """The names of classes, in order, from a list or a file of one a line.

    Raises:
        ValueError: none, one that is empty, or one that is there twice.
    """
    if isinstance(classes, os.PathLike):
        names = [line for _, line in read_lines(Path(classes))]
    elif isinstance(classes, str):
        raise ValueError(f"classes: got the str {classes[:80]!r}, expected a list of names, or a pathlib.Path")
    else:
        names = list(classes)
    wrong = next((name for name in names if not tables.is_text(name)), None)
    if not names or wrong is not None:
        raise ValueError(f"classes: got {'none' if not names else repr(wrong)}, expected names")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"classes: {twice!r} is there more than once, so that its index is not known")
    return names


def check_seeds(seeds: Seeds | None) -> range | tuple[int, ...] | None:
    """Seeds as a sequence; None of None. What a long range says is not written out.

    Raises:
        ValueError: none, or one that is none.
    """
    if seeds is None:
        return None
    several: Any = seeds if hasattr(seeds, "__getitem__") else (seeds,)
    given: range | tuple[int, ...]
    try:
        if isinstance(several, str | bytes | Mapping):
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


def check_templates(templates: str | Sequence[str]) -> list[str]:
    """Templates as a list.

    Raises:
        ValueError: none, or one without exactly one place for the class.
    """
    texts = [templates] if isinstance(templates, str) else list(templates)
    for text in texts or [""]:
        try:
            if [part[1:] for part in string.Formatter().parse(text) if part[1] is not None] not in (
                [("", "", None)],
                [("class", "", None)],
            ):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"templates: got {text!r}, expected texts such as 'a photo of a {{}}', each with one {{}} or {{class}}"
            ) from None
    return texts


def filled(template: str, name: str) -> str:
    """A template with a class in its place."""
    return template.format(name, **{"class": name})


def _some(file: Path, rows: Iterator[GenerateRow]) -> Iterator[GenerateRow]:
    row = None
    for row in rows:
        yield row
    if row is None:
        raise ValueError(f"{file} has no rows")


def _rows(prompts: Iterable[Any], seeds: Sequence[int] | None) -> Iterator[GenerateRow]:
    for number, given in enumerate(prompts):
        place = f"prompts[{number}]"
        if isinstance(given, GenerateRow):
            if seeds is not None:
                raise ValueError(f"{place} is a GenerateRow, which has a seed, and seeds are given too")
            yield given
            continue
        if isinstance(given, str):
            given = {"prompt": given}
        if not isinstance(given, Mapping):
            raise ValueError(f"{place}: got {repr(given)[:80]}, expected a text, a mapping or a GenerateRow")
        named = _fields(given, place, more="size")
        yield from _made({named[column]: value for column, value in given.items()}, named, place, seeds)


def _table_rows(row: Row, folder: Path, ignore: frozenset[str], seeds: Sequence[int] | None) -> Iterator[GenerateRow]:
    named = _fields(row.values, row.place, ignore)
    values = {
        field: _value(row, column, field, folder)
        for column, field in named.items()
        if row.has(column) or (row.values[column] == "" and _may_be_empty(field, row.is_csv))
    }
    return _made(values, named, row.place, seeds)


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


def _made(
    values: dict[str, Any], named: Mapping[str, str], place: str, seeds: Sequence[int] | None
) -> Iterator[GenerateRow]:
    """The rows that a mapping of fields is."""
    said = {field: value for field, value in values.items() if value is not None}
    if "prompt" not in said:
        raise ValueError(f"{place}, column 'prompt': the value is missing")
    if seeds is not None and "seed" in said:
        raise ValueError(f"{place} has a seed, and seeds are given too; expected one of them")
    sides = [side for side in ("height", "width") if side in said]
    if len(sides) == 1 or (sides and "size" in said):
        raise ValueError(f"{place}: got {sides[0]} {'alone' if len(sides) == 1 else 'and size'}, expected both sides")
    if sides:
        said["size"] = (said.pop("height"), said.pop("width"))
    try:
        yield from _seeded(said, seeds)
    except ValueError as error:
        field, colon, rest = str(error).partition(": ")
        column = next((column for column, meant in named.items() if meant == field), None)
        where = f"{place}, column {column!r}" if colon and column else place
        raise ValueError(f"{where}: {rest if colon and column else error}") from None


def _seeded(said: Mapping[str, Any], seeds: Sequence[int] | None) -> Iterator[GenerateRow]:
    row = GenerateRow(**said)
    if seeds is None:
        yield row
    else:
        yield from (replace(row, seed=seed) for seed in seeds)


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
        if (field := ALIASES.get(name, name)) in found.values():
            raise ValueError(
                f": the columns {next(each for each in found if found[each] == field)} and {name} say both"
            )
        found[name] = field
    return found
