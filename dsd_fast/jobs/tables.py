"""Rows of CSV, JSON-lines and Parquet files, each with its place, and whole JSON files."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}

# Rows of a Parquet file held as Python objects at once; images may be embedded in them.
_BATCH = 64
_EXACT = 1 << 53
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


@dataclass(frozen=True)
class Row:
    """One row, by column.

    Attributes:
        place: the file and the row, as errors name them: lines and rows are counted from 1, a header is a line too.
        values: column → value; a CSV's are all strings.
        is_csv: whether lists are written as JSON within a cell, and numbers as text.
    """

    place: str
    values: Mapping[str, Any]
    is_csv: bool = False

    def wrong(self, column: str, expected: str) -> ValueError:
        """The error of a value that is not what its column holds."""
        return ValueError(f"{self.place}, column {column!r}: got {repr(self.values[column])[:80]}, expected {expected}")

    def has(self, column: str) -> bool:
        """Whether there is a value: null and an empty string are none."""
        return self.values.get(column) not in (None, "")

    def value(self, column: str) -> Any:
        """The value of a column that must have one."""
        if column not in self.values:
            raise ValueError(
                f"{self.place}: column {column!r} is missing; there are {', '.join(self.values) or 'none'}"
            )
        if not self.has(column):
            raise ValueError(f"{self.place}, column {column!r}: the value is missing")
        return self.values[column]

    def text(self, column: str) -> str:
        """A text that is not blank."""
        value = self.value(column)
        if not is_text(value):
            raise self.wrong(column, "a text")
        return str(value)

    def integer(self, column: str) -> int:
        """A whole number, also as tables come to hold one: 1.0 (of a column with gaps), true, or the text of any."""
        value = self.value(column)
        if isinstance(value, str):
            text = value.strip().lower()
            if re.fullmatch(r"-?[0-9]{1,20}", text):
                return int(text)
            if re.fullmatch(r"-?[0-9]{1,20}\.0*", text):
                value = float(text)
            value = {"true": True, "false": False}.get(text, value)
        if not isinstance(value, (int, float)) or value != value or value % 1:
            raise self.wrong(column, "a whole number")
        if isinstance(value, float) and abs(value) > _EXACT:
            # Of a column with gaps, say, which pandas makes floating-point.
            raise self.wrong(column, "a whole number with all its digits, which floating point has not beyond 2**53")
        return int(value)

    def number(self, column: str) -> float:
        """A number, or the text of one."""
        value = self.value(column)
        try:
            if isinstance(value, bool):
                raise TypeError
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise self.wrong(column, "a number") from None

    def items(self, column: str) -> list[Any]:
        """A list; in a CSV as JSON."""
        value = self.value(column)
        if self.is_csv:
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise self.wrong(column, "a JSON list") from None
        if not isinstance(value, list):
            raise self.wrong(column, "a JSON list" if self.is_csv else "a list")
        return value

    def name(self, column: str) -> str:
        """A text or a whole number as text; "" where there is none."""
        if not self.has(column):
            return ""
        value = self.values[column]
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not is_text(value):
            raise self.wrong(column, "a text or a whole number")
        return str(value)


def image_path(folder: Path, name: str, place: str) -> Path:
    """The path of an image that a table names, below a folder; whether it exists is not looked at.

    Absolute names stand as they are. Relative ones may have "..", but not leave the folder.

    Raises:
        ValueError: a URL, or another name that is none of a file there.
    """
    if _URL.match(name):
        raise ValueError(f"{place}: the image {name[:80]!r} is a URL, which is not followed; expected a file name")
    if "\0" in name or not name.strip():
        raise ValueError(f"{place}: the image {name[:80]!r} is no file name")
    if not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise ValueError(
            f"{place}: the image {name[:80]!r} leaves the folder of images, {folder}; "
            "give that folder as images=, or absolute names"
        )
    return folder / name


def is_text(value: object) -> bool:
    """Whether a value is a string with more than white space, and no half of a surrogate pair, which no file holds."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


def read_rows(file: Path, container: str) -> Iterator[Row]:
    """The rows of a table, one by one.

    Args:
        file: UTF-8 text, a byte order mark is dropped; or Parquet.
        container: "csv", "jsonl" or "parquet".

    Raises:
        ValueError: the file cannot be read, or something in it is wrong, by line.
    """
    readers = {"csv": _csv_rows, "jsonl": _json_rows, "parquet": _parquet_rows}
    return readers[container](file)


def read_json(file: Path) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: the file cannot be read or is not JSON, by line.
    """
    with _opened(file) as stream:
        try:
            return json.load(stream)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {error.lineno}: not JSON: {error.msg}, character {error.colno}") from None
        except RecursionError:
            raise ValueError(f"{file}: not JSON that can be read: nested too deeply") from None


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without white space around it) of the lines that are not blank.

    Raises:
        ValueError: the file cannot be read.
    """
    with _opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line.strip()


@contextmanager
def _opened(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    try:
        with file.open(encoding="utf-8-sig", newline=newline) as stream:
            yield stream
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise ValueError(f"{file} is not UTF-8 text: it has the byte 0x{wrong:02x} where none may be") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error


def _csv_rows(file: Path) -> Iterator[Row]:
    # newline="": the csv module wants line ends as they are, for those within quotes.
    with _opened(file, newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{file}, line {line}: not CSV: {error}") from None
            if cells is None:
                return
            if not cells:
                continue
            if header is None:
                header = cells
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise ValueError(f"{file}, line {line}: the header has {twice[0]!r} more than once")
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{file}, line {line}: got {len(cells)} cells, expected {len(header)} as in the header"
                )
            yield Row(f"{file}, line {line}", dict(zip(header, cells, strict=True)), is_csv=True)


def _json_rows(file: Path) -> Iterator[Row]:
    for number, line in read_lines(file):
        place = f"{file}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON: {error.msg}, character {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON that can be read: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{place}: got {repr(values)[:80]}, expected a JSON object")
        yield Row(place, values)


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file}, row {number}", values)
    except pa.ArrowException as error:
        raise ValueError(f"{file} is not a Parquet file that can be read: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
