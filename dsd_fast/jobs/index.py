"""The index of a folder of shards (see `dsd_fast.jobs.store`), whole, shard by shard, or a worker's part of it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsd_fast.jobs.store import FILES, INDEX, OK, OWN_COLUMNS, marked

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


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
    kinds = {name: pa.int32() if name == "row" else pa.string() for name in names or OWN_COLUMNS}
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
    for match in marked(folder):
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

    return np.frombuffer(bytes.fromhex("".join(table["id"].to_pylist())), np.uint64)[::2].copy()


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
    shards = [(match[0], (int(match[2]), int(match[3]))) for match in marked(folder)]
    if all(workers == of[1] for _, (_, workers) in shards):
        shards = [each for each in shards if each[1] == of]
    for shard, _ in shards:
        if (table := read_shard(folder, shard, names)) is not None:
            yield table


def read_shard(folder: Path, shard: str, columns: Sequence[str] | None = None) -> pa.Table | None:
    """The rows of one shard, superseded ones too, by ``columns`` (None: all); None where it is not whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(folder / INDEX / f"{shard}.parquet") as file:
            sizes = json.loads((file.schema_arrow.metadata or {})[FILES])
            if any((folder / name).stat().st_size != size for name, size in sizes.items()):
                return None
            return file.read(columns, use_threads=False).replace_schema_metadata()
    except (pa.ArrowInvalid, FileNotFoundError, NotADirectoryError, KeyError, ValueError):
        # Copied in part, or changed by others: its rows are to be made again.
        return None
