"""A folder of shards.

manifest.json         what the results were made with
shards/<shard>.*      the results, in files that the job names
index/<shard>.parquet its rows: id, name, status, reason, message, shard, row, and the job's own columns; written last

A shard counts as whole, and its rows as made, when its index is there and all files that the index names are, in full
length. Whatever else lies in the folder is ignored.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dsd_fast.jobs.files import renaming, sync_folder
from dsd_fast.jobs.ids import row_id

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = "index"
SHARDS = "shards"
OK, ERROR = "ok", "error"

_WORK = re.compile(r"\.work-(\d+)of(\d+)")
_SHARD = re.compile(r"(\d{6,})-(\d+)of(\d+)-[0-9a-f]{16}")
FILES = b"dsd_fast.files"
OWN_COLUMNS = ("id", "name", "status", "reason", "message", "shard", "row")


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        id: 32 hexadecimal digits, as `row_id` makes them.
        name: for people.
        payload: what the shard's files hold of it; None of an error.
        columns: the job's own columns of the index.
        reason: a word, of an error; "" of a result.
        message: a sentence, of an error.
    """

    id: str
    name: str
    payload: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    message: str = ""

    @property
    def status(self) -> str:
        """ "ok" or "error"."""
        return ERROR if self.reason else OK


class ShardFiles:
    """The files of a shard that is being written.

    Attributes:
        name: of the shard: its number among its worker's, the worker, and what its rows' ids give.
        folder: the job's.
    """

    def __init__(self, folder: Path, number: int, worker: int, workers: int, rows: Sequence[Row]) -> None:
        self.folder = folder
        self.name = f"{number:06d}-{worker}of{workers}-{row_id(*(row.id for row in rows))[:16]}"
        self._work = work_folder(folder, worker, workers)
        self._sizes: dict[str, int] = {}

    @contextmanager
    def open(self, name: str | os.PathLike[str] | None = None, *, suffix: str = "") -> Iterator[BinaryIO]:
        """A file to write, which takes its name when the block ends, its content on the disk.

        Args:
            name: its path below the job's folder; None: shards/<name of the shard><suffix>.
            suffix: as ".tar".

        Raises:
            ValueError: a path that leads out of the folder.
            OSError: the folder cannot be written, or the disk is full.
        """
        relative = Path(name or f"{SHARDS}/{self.name}{suffix}")
        if relative.is_absolute() or ".." in relative.parts:
            raise ValueError(f"name is {str(relative)!r}, expected a path inside the job's folder")
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        self._work.mkdir(exist_ok=True)
        with renaming(self._work / f"{len(self._sizes)}.tmp", path) as file:
            yield file
            file.flush()
            size = file.tell()
        self._sizes[relative.as_posix()] = size

    def finish(self, rows: Sequence[Row], columns: Mapping[str, str | pa.DataType]) -> None:
        """Makes the shard whole: the names of its files last, then its index appears.

        Args:
            rows: all of the shard; those that are no errors are numbered from 0.
            columns: the job's own: name → type, as pyarrow names it or has it.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        import pyarrow as pa

        self._sync()
        positions, position = [], 0
        for row in rows:
            positions.append(None if row.reason else position)
            position += not row.reason
        found = {
            "id": ("string", [row.id for row in rows]),
            "name": ("string", [storable(row.name) for row in rows]),
            "status": ("string", [row.status for row in rows]),
            "reason": ("string", [row.reason for row in rows]),
            "message": ("string", [storable(row.message) for row in rows]),
            "shard": ("string", [self.name] * len(rows)),
            "row": ("int32", positions),
            **{name: (kind, [row.columns.get(name) for row in rows]) for name, kind in columns.items()},
        }
        table = pa.table(
            {
                name: pa.array(values, pa.type_for_alias(kind) if isinstance(kind, str) else kind)
                for name, (kind, values) in found.items()
            },
            metadata={FILES: json.dumps(self._sizes)},
        )
        with self.open(f"{INDEX}/{self.name}.parquet") as file:
            file.write(parquet_bytes(table))
        sync_folder(self.folder / INDEX)

    def remove(self) -> None:
        """Takes the shard's files away again, as far as the system lets it."""
        for name in self._sizes:
            with suppress(OSError):
                (self.folder / name).unlink(missing_ok=True)

    def _sync(self) -> None:
        parents = {parent for name in self._sizes for parent in Path(name).parents}
        (self.folder / INDEX).mkdir(exist_ok=True)
        for parent in sorted({*parents, Path()}, key=lambda each: len(each.parts), reverse=True):
            sync_folder(self.folder / parent)


def marked(folder: Path) -> list[re.Match[str]]:
    """The names of the shards that have an index, by their numbers; only reading tells whether they are whole."""
    try:
        names = [file.stem for file in (folder / INDEX).iterdir() if file.suffix == ".parquet"]
    except FileNotFoundError:
        return []
    found = [match for name in names if (match := _SHARD.fullmatch(name))]
    return sorted(found, key=lambda match: (int(match[1]), match[0]))


def next_number(folder: Path, worker: int, workers: int) -> int:
    """Of a worker's next shard: above its own, and above those of runs with another number of workers.

    Workers beside this one number theirs as they go, which must not bend this one's.
    """
    return 1 + max((int(match[1]) for match in marked(folder) if _is_free(match, 2, worker, workers)), default=-1)


def remove_leftovers(folder: Path, worker: int, workers: int) -> None:
    """Removes what writers that died have left; of those that may live, workers beside this one, nothing.

    Raises:
        OSError: the folder cannot be read or written.
    """

    for file in list(folder.iterdir()):
        if (found := _WORK.fullmatch(file.name)) and _is_free(found, 1, worker, workers):
            shutil.rmtree(file)
    if (folder / SHARDS).is_dir():
        whole = {match[0] for match in marked(folder)}
        for file in list((folder / SHARDS).iterdir()):
            shard = file.name.split(".")[0]
            if shard not in whole and (found := _SHARD.fullmatch(shard)) and _is_free(found, 2, worker, workers):
                file.unlink()


def work_folder(folder: Path, worker: int, workers: int) -> Path:
    """Where a worker's files are before they have their names."""
    return folder / f".work-{worker}of{workers}"


def _is_free(found: re.Match[str], first: int, worker: int, workers: int) -> bool:
    """Whether a name, with worker and workers from group ``first`` on, is this worker's or of nobody who may live."""
    return int(found[first + 1]) != workers or int(found[first]) == worker


def parquet_bytes(table: pa.Table, **options: Any) -> memoryview:
    """Write a table as a Parquet file into memory, so that what the disk refuses is said by the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pa.BufferOutputStream()
    pq.write_table(table, content, **options)
    return memoryview(content.getvalue())


def storable(text: str) -> str:
    """Write text as UTF-8, and so Parquet, can hold it: what of a file's name is no text becomes escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
