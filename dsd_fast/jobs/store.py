"""A folder of shards.

manifest.json         what the results were made with
shards/<shard>.*      the results, in files that the job names
index/<shard>.parquet its rows: id, name, status, reason, message, shard, row, and the job's own columns; written last

A shard counts as whole, and its rows as made, when its index is there and all files that the index names are, in full
length. Whatever else lies in the folder is ignored.
"""

from __future__ import annotations

import errno
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
    import numpy as np
    import pyarrow as pa

INDEX = "index"
SHARDS = "shards"
OK, ERROR = "ok", "error"

_WORK = re.compile(r"\.work-(\d+)of(\d+)")
_SHARD = re.compile(r"(\d{6,})-(\d+)of(\d+)-[0-9a-f]{16}")
_FILES = b"dsd_fast.files"
_COLUMNS = ("id", "name", "status", "reason", "message", "shard", "row")


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
        import pyarrow.parquet as pq

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
            metadata={_FILES: json.dumps(self._sizes)},
        )
        # Through memory, so that what the disk refuses is said by the file and not by a Parquet writer.
        content = pa.BufferOutputStream()
        pq.write_table(table, content)
        with self.open(f"{INDEX}/{self.name}.parquet") as file:
            file.write(content.getvalue())
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


def read_index(folder: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of all whole shards, each id once.

    A row that was made anew, as an error that was tried again, counts as what it was made last, and a result before an
    error.

    Args:
        columns: to read; None: all. "id", "status" and "shard" are always among them.

    Returns:
        A pyarrow Table: id, name, status "ok" or "error", reason, message, shard, row (its position in the shard's
        files, null of an error), and the job's own columns; in the order of the shards, workers beside each other.

    Raises:
        OSError: the folder cannot be read.
    """
    import pyarrow as pa

    path = Path(folder)
    names = None if columns is None else list(dict.fromkeys(["id", *columns, "status", "shard"]))
    tables = list(index_shards(path, names))
    if tables:
        return pa.concat_tables(tables, promote_options="default")
    kinds = {name: pa.int32() if name == "row" else pa.string() for name in names or _COLUMNS}
    return pa.schema(kinds).empty_table()


def index_shards(folder: Path, names: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows of :func:`read_index`, shard by shard, those shards left out of which no row is left.

    Memory: a shard, 16 bytes for each row in the folder, and a few hundred for each that was made anew.

    Args:
        names: of the columns, "id" among them; None: all.

    Raises:
        OSError: the folder cannot be read, or a shard has gone meanwhile.
    """
    import numpy as np

    # Of shards that are finished meanwhile none counts.
    shards, halves = [], [np.empty(0, np.uint64)]
    for match in _marked(folder):
        if (table := read_shard(folder, match[0], ["id"])) is not None:
            shards.append(match[0])
            halves.append(_halves(table))
    every = np.concatenate(halves)
    halves.clear()
    every.sort()
    again = np.unique(every[1:][every[1:] == every[:-1]])
    del every
    # The larger of two rows of an id counts: made without an error, then made later.
    best: dict[str, tuple[bool, int]] = {}
    for number, shard in enumerate(shards if len(again) else ()):
        table = _whole(folder, shard, ["id", "status"])
        for row in table.filter(np.isin(_halves(table), again)).to_pylist():
            best[row["id"]] = max(best.get(row["id"], (False, -1)), (row["status"] == OK, number))
    for number, shard in enumerate(shards):
        table = _whole(folder, shard, names)
        if len(again):
            table = table.filter([best.get(row, (True, number))[1] == number for row in table["id"].to_pylist()])
        if len(table):
            yield table


def _halves(table: pa.Table) -> np.ndarray:
    """(N,) the first 8 bytes of each id: what differs in them differs."""
    import numpy as np

    return np.frombuffer(bytes.fromhex("".join(table["id"].to_pylist())), np.uint64)[::2]


def _whole(folder: Path, shard: str, names: Sequence[str] | None) -> pa.Table:
    if (table := read_shard(folder, shard, names)) is None:
        raise FileNotFoundError(errno.ENOENT, f"the files of shard {shard} have changed while they were read")
    return table


def index_parts(folder: Path, names: Sequence[str], of: tuple[int, int]) -> Iterator[pa.Table]:
    """What a worker must know of the index, shard by shard; a row that was made anew comes each time.

    Args:
        names: of the columns.
        of: (worker, workers): its shards alone where all in the folder are of so many workers, as then they hold all
            rows that are its own; else the shards of all.

    Raises:
        OSError: the folder cannot be read.
    """
    shards = [(match[0], (int(match[2]), int(match[3]))) for match in _marked(folder)]
    if all(workers == of[1] for _, (_, workers) in shards):
        shards = [each for each in shards if each[1] == of]
    for shard, _ in shards:
        if (table := read_shard(folder, shard, names)) is not None:
            yield table


def _marked(folder: Path) -> list[re.Match[str]]:
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
    return 1 + max((int(match[1]) for match in _marked(folder) if _is_free(match, 2, worker, workers)), default=-1)


def remove_leftovers(folder: Path, worker: int, workers: int) -> None:
    """Removes what writers that died have left; of those that may live, workers beside this one, nothing.

    Raises:
        OSError: the folder cannot be read or written.
    """

    for file in list(folder.iterdir()):
        if (found := _WORK.fullmatch(file.name)) and _is_free(found, 1, worker, workers):
            shutil.rmtree(file)
    if (folder / SHARDS).is_dir():
        marked = {match[0] for match in _marked(folder)}
        for file in list((folder / SHARDS).iterdir()):
            shard = file.name.split(".")[0]
            if shard not in marked and (found := _SHARD.fullmatch(shard)) and _is_free(found, 2, worker, workers):
                file.unlink()


def work_folder(folder: Path, worker: int, workers: int) -> Path:
    """Where a worker's files are before they have their names."""
    return folder / f".work-{worker}of{workers}"


def _is_free(found: re.Match[str], first: int, worker: int, workers: int) -> bool:
    """Whether a name, with worker and workers from group ``first`` on, is this worker's or of nobody who may live."""
    return int(found[first + 1]) != workers or int(found[first]) == worker


def read_shard(folder: Path, shard: str, columns: Sequence[str] | None = None) -> pa.Table | None:
    """The rows of one shard, superseded ones too, by ``columns`` (None: all); None where it is not whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(folder / INDEX / f"{shard}.parquet") as file:
            sizes = json.loads((file.schema_arrow.metadata or {})[_FILES])
            if any((folder / name).stat().st_size != size for name, size in sizes.items()):
                return None
            return file.read(columns, use_threads=False).replace_schema_metadata()
    except (pa.ArrowInvalid, FileNotFoundError, NotADirectoryError, KeyError, ValueError):
        # Copied in part, or changed by others: its rows are to be made again.
        return None


def storable(text: str) -> str:
    """Write text as UTF-8, and so Parquet, can hold it: what of a file's name is no text becomes escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
