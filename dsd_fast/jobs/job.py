"""A job: many rows into shards, by one or more processes, any of which may die at any moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from dsd_fast.jobs.errors import JobError
from dsd_fast.jobs.files import remove_stale
from dsd_fast.jobs.ids import packed, worker_of
from dsd_fast.jobs.index import index_parts
from dsd_fast.jobs.lock import locked_worker, mark_ended, waiting
from dsd_fast.jobs.manifest import open_manifest
from dsd_fast.jobs.store import OK, Row, ShardFiles, next_number, remove_leftovers, work_folder
from dsd_fast.jobs.timeline import Timeline
from dsd_fast.jobs.writer import Writer

if TYPE_CHECKING:
    import pyarrow as pa

Item = TypeVar("Item")
Write = Callable[[ShardFiles, Sequence[Row]], None]


@dataclass
class Counts:
    """What became of a worker's inputs: inputs = ok + errors + duplicates + done + not_reached.

    Attributes:
        inputs: given to this worker.
        ok: rows written now, in whole shards.
        errors: rows of inputs that cannot be used, written now, in whole shards.
        duplicates: inputs seen before in this run.
        done: inputs whose rows earlier runs have written.
        done_errors: those of ``done`` whose rows are errors.
        elsewhere: inputs of other workers, which ``inputs`` leaves out.
    """

    inputs: int = 0
    ok: int = 0
    errors: int = 0
    duplicates: int = 0
    done: int = 0
    done_errors: int = 0
    elsewhere: int = 0

    @property
    def not_reached(self) -> int:
        """Inputs of which no row is written: 0 once a job has ended well."""
        return self.inputs - self.ok - self.errors - self.duplicates - self.done


class Job:
    """Rows into a folder of shards (see `dsd_fast.jobs.store`); a context manager.

    A job that is killed, whenever that is, and started again goes on after its last whole shard and gives the same
    shards, byte for byte when the inputs come in the same order. An exception inside the block ends it in the same way:
    the rows of the shard that was being filled are made again by the next run.

    ::

        with Job(folder, "features", settings, write=write, columns={"prompt": "string"}) as job:
            for item in job.pending(items, key=lambda item: item.id):
                job.put(item.id, item.name, compute(item), prompt=item.prompt)      # or job.fail(…)
        job.counts

    Args:
        folder: made if missing; one job's alone.
        kind: of the job, as "features".
        settings: all that changes results, as JSON knows it; see `open_manifest`.
        write: called as ``write(files, rows)``, in another thread, with the results of a shard in their order; it
            writes their payloads by ``files.open(…)``, the same bytes for the same rows. None: the index is all.
        columns: of the index besides its own: name → type, as pyarrow has it or names it ("string", "int64").
        shard_rows: rows of a shard, errors included.
        worker: which of ``workers`` this is, from 0. Each row is one worker's, by its id.
        workers: processes that share the job. They may run at once or one after the other.
        retry_errors: whether inputs whose rows are errors are tried again.

    Raises:
        ValueError: ``shard_rows``, ``workers`` or ``worker`` is not what is expected.

    Attributes:
        counts: what has become of the inputs so far.
        timeline: spans, to which callers add what they do; the job's own is "write".
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        kind: str,
        settings: Mapping[str, Any],
        *,
        write: Write | None = None,
        columns: Mapping[str, str | pa.DataType] | None = None,
        shard_rows: int = 256,
        worker: int = 0,
        workers: int = 1,
        retry_errors: bool = False,
    ) -> None:
        if shard_rows < 1:
            raise ValueError(f"shard_rows is {shard_rows}, expected at least 1")
        if workers < 1:
            raise ValueError(f"workers is {workers}, expected at least 1")
        if not 0 <= worker < workers:
            raise ValueError(f"worker is {worker}, expected 0 to {workers - 1}, one of {workers} workers")
        self.folder = Path(folder)
        self.counts = Counts()
        self.timeline = Timeline()
        self._kind, self._settings = kind, settings
        self._write, self._columns = write, dict(columns or {})
        self._shard_rows, self._retry_errors = shard_rows, retry_errors
        self._worker, self._workers = worker, workers
        name = "timeline.json" if workers == 1 else f"timeline-{worker}of{workers}.json"
        self._timeline_file = self.folder / name
        self._rows: list[Row] = []
        self._seen: set[bytes] = set()
        self._open: set[bytes] = set()
        self._done: dict[bytes, bool] = {}
        self._safe = self._number = 0
        self._asked = False

    def __enter__(self) -> Job:
        """Takes the folder.

        Raises:
            LockedError: another process writes to it that does not share the job, or is the same worker.
            ManifestError: it holds the results of another job.
            JobError: it cannot be written.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(locked_worker(self.folder, self._worker, self._workers))
                open_manifest(self.folder, self._kind, self._settings)
                # Of what the dead have left, workers that start at once would each remove the same.
                with waiting(self.folder):
                    remove_leftovers(self.folder, self._worker, self._workers)
                remove_stale(self._timeline_file)
                self._resume()
            except OSError as error:
                raise self._error(error) from error
            self._writer = Writer()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Writes what is left.

        Raises:
            JobError: the folder cannot be written.
        """
        with self._stack:
            try:
                try:
                    if kind is None and self._rows:
                        self._queue()
                finally:
                    self._writer.close()
                if kind is None and self._asked and not self._open:
                    mark_ended(self.folder, self._worker, self._workers)
            except OSError as refused:
                # An exception that is already on its way tells more, and may be this one.
                if kind is None:
                    raise self._error(refused) from refused
            finally:
                with suppress(OSError):
                    work_folder(self.folder, self._worker, self._workers).rmdir()
                with suppress(OSError):
                    if self.counts.ok + self.counts.errors:
                        self.timeline.save(self._timeline_file)

    def pending(self, items: Iterable[Item], key: Callable[[Item], str]) -> Iterator[Item]:
        """This worker's items whose rows are still to be made, each id once, consumed as they are asked for.

        Each is then given to :meth:`put` or :meth:`fail`, in the order that the rows shall have.

        Args:
            key: gives an item's id.

        Raises:
            ValueError: an id that :func:`row_id` does not make.
        """
        for item in items:
            name = key(item)
            if worker_of(name, self._workers) != self._worker:
                self.counts.elsewhere += 1
                continue
            self.counts.inputs += 1
            row = packed(name)
            if row in self._seen:
                self.counts.duplicates += 1
                continue
            self._seen.add(row)
            if (ok := self._done.pop(row, None)) is None:
                self._open.add(row)
                yield item
            else:
                self.counts.done += 1
                self.counts.done_errors += not ok
        self._asked = True

    def put(self, id: str, name: str, payload: Any = None, **columns: Any) -> None:
        """A result, whose ``payload`` is held as it is until its shard is written: it is not to be filled again.

        Raises:
            ValueError: an id that is not pending, or a column that the job has not.
            JobError: the folder cannot be written; says how many rows are safe.
        """
        self._add(Row(id, name, payload, columns))

    def fail(self, id: str, name: str, reason: str, message: str, **columns: Any) -> None:
        """An input that cannot be used.

        Raises:
            ValueError: an id that is not pending, no ``reason``, or a column that the job has not.
            JobError: the folder cannot be written; says how many rows are safe.
        """
        if not reason:
            raise ValueError("reason is empty, expected a word")
        self._add(Row(id, name, None, columns, reason, message))

    def _add(self, row: Row) -> None:
        if row.columns.keys() - self._columns.keys():
            unknown = ", ".join(sorted(row.columns.keys() - self._columns.keys()))
            raise ValueError(f"columns: got {unknown}, expected {', '.join(self._columns) or 'none'}")
        if (name := packed(row.id)) not in self._open:
            raise ValueError(f"id is {row.id!r}, expected one that pending has given and that has no row yet")
        self._open.remove(name)
        self._rows.append(row)
        if len(self._rows) >= self._shard_rows:
            try:
                self._queue()
            except OSError as error:
                raise self._error(error) from error

    def _queue(self) -> None:
        rows, self._rows = self._rows, []
        files = ShardFiles(self.folder, self._number, self._worker, self._workers, rows)
        self._number += 1
        self._writer.put(lambda: self._finish(files, rows))

    def _finish(self, files: ShardFiles, rows: Sequence[Row]) -> None:
        with self.timeline.span("write"):
            results = [row for row in rows if row.status == OK]
            try:
                if self._write is not None and results:
                    self._write(files, results)
                files.finish(rows, self._columns)
            except BaseException:
                files.remove()
                raise
        self.counts.ok += len(results)
        self.counts.errors += len(rows) - len(results)
        self._safe += len(rows)

    def _resume(self) -> None:
        self._number = next_number(self.folder, self._worker, self._workers)
        # Shard by shard: texts take several times the room that an id takes here.
        for part in index_parts(self.folder, ["id", "status"], (self._worker, self._workers)):
            for name, status in zip(part["id"].to_pylist(), part["status"].to_pylist(), strict=True):
                if worker_of(name, self._workers) == self._worker:
                    row = packed(name)
                    # A result counts before an error, whichever was made last.
                    self._done[row] = status == OK or self._done.get(row, False)
        self._safe = len(self._done)
        if self._retry_errors:
            self._done = {row: True for row, ok in self._done.items() if ok}

    def _error(self, error: OSError) -> JobError:
        reason = "it is a file" if self.folder.is_file() else error.strerror or error
        rows = "1 row is" if self._safe == 1 else f"{self._safe} rows are"
        return JobError(
            f"{self.folder} cannot be written: {reason}; {rows} safe, and the same command goes on from there"
        )
