"""What `dsd-fast match` makes of its folder's rows in the end: scores.parquet, results.json, heat maps, report.html."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dsd_fast.cli.files import removing, replacing_files, writing
from dsd_fast.cli.heatmaps import FOLDER, NAMES
from dsd_fast.cli.match.options import MatchRequest
from dsd_fast.cli.match.report import MatchReport
from dsd_fast.cli.results import ScoreFile, metadata, ranked, settings_of, stream_json, versions
from dsd_fast.cli.terminal import SHOWN, Interrupt, progress
from dsd_fast.jobs import index_shards, read_shard, remove_stale, replacing, storable, waiting
from dsd_fast.jobs.store import OK
from dsd_fast.matching import Matcher

RESULTS, SCORES, PAGE = "results.json", "scores.parquet", "report.html"

# Errors that are shown; results.json has all.
_ERRORS = 50


class Rows:
    """The rows of a folder by id; of the scores, those of a shard of each worker are in memory.

    Args:
        folder: of the job.
        captions: M, scores of a row.
    """

    def __init__(self, folder: Path, captions: int) -> None:
        self._folder, self._captions = folder, captions
        self._shard_of: dict[bytes, str] = {}
        self._errors = set[bytes]()
        workers = set[str]()
        for rows in index_shards(folder, ["id", "shard", "status"]):
            shard, ids = rows["shard"][0].as_py(), [bytes.fromhex(row) for row in rows["id"].to_pylist()]
            self._shard_of |= dict.fromkeys(ids, shard)
            self._errors.update(
                row for row, status in zip(ids, rows["status"].to_pylist(), strict=True) if status != OK
            )
            workers.add(shard.split("-")[1])
        # Each worker's shards have the order of the inputs.
        self._read = lru_cache(len(workers) + 1)(self._shard)

    def counts(self, rows: Sequence[bytes]) -> dict[str, int]:
        """Counts the inputs of those rows: scored, errors, and those without a row yet."""
        there = sum(row in self._shard_of for row in rows)
        errors = sum(row in self._errors for row in rows)
        return {"scored": there - errors, "errors": errors, "not_reached": len(rows) - there}

    def __getitem__(self, row: bytes) -> NDArray[np.float32] | tuple[str, str] | None:
        """(M,) scores, reason and message of an error, or None where there is no row."""
        shard = self._shard_of.get(row)
        return None if shard is None else self._read(shard).get(row)

    def _shard(self, shard: str) -> dict[bytes, NDArray[np.float32] | tuple[str, str]]:
        table = read_shard(self._folder, shard, ["id", "status", "reason", "message", "scores"])
        if table is None:
            return {}
        scores = iter(table["scores"].combine_chunks().flatten().to_numpy().reshape(-1, self._captions))
        columns = (table[name].to_pylist() for name in ("id", "status", "reason", "message"))
        return {
            bytes.fromhex(row): next(scores) if status == OK else (reason, message)
            for row, status, reason, message in zip(*columns, strict=True)
        }


def check_names(out: Path) -> None:
    """Refuses a folder where a name of the results is taken, before there are any.

    Raises:
        OSError: it is.
    """
    for name in (RESULTS, SCORES, PAGE):
        if (out / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(out / name))
    if (out / FOLDER).is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(out / FOLDER))


def write_results(
    request: MatchRequest,
    captions: Sequence[str],
    matcher: Matcher,
    images: Sequence[Path],
    ids: Sequence[bytes],
    seconds: float,
    interrupt: Interrupt | None,
) -> dict[str, Any]:
    """Writes all results anew from the folder's rows, in the order of the images; one process at a time.

    When they take their names, report.html and heat maps of an earlier run that are not among them are removed. After
    Ctrl-C no more heat maps are drawn.

    Args:
        ids: the row of each image, of the first ones after Ctrl-C.
        seconds: that scoring took.

    Returns:
        "complete", which Ctrl-C makes false, "counts", "heatmap_seconds", and of the images the first that are "shown"
        and the first "errors"; the first two alone where nothing is written, since other workers' rows are missing.

    Raises:
        CommandError: `out` cannot be written.
    """
    out, heatmaps = request.out, request.heatmaps
    with writing(out), waiting(out, "results"):
        rows = Rows(out, len(captions))
        counts = {"images": len(images), "captions": len(captions), **rows.counts(ids)}
        counts["not_reached"] += len(images) - len(ids)
        if counts["not_reached"] and (request.workers.share()[1] > 1 or request.workers.engine is not None):
            return {"complete": interrupt is None or not interrupt.requested, "counts": counts}
        for name in (RESULTS, SCORES, PAGE):
            remove_stale(out / name)
        # results.json opens first, so that it takes its name last: it vouches for the scores.
        with (
            # What an earlier run has left goes after that, since its own results.json names it.
            ExitStack() as afterwards,
            replacing(out / RESULTS) as results,
            replacing(out / SCORES) as table,
            ExitStack() as stack,
        ):
            page, folder = None, out / FOLDER
            if heatmaps or folder.is_dir():
                folder = afterwards.enter_context(replacing_files(folder, NAMES))
            if request.report or heatmaps:
                page = stack.enter_context(replacing(out / PAGE))
            else:
                afterwards.enter_context(removing(out / PAGE))
            settings = {
                **settings_of(matcher),
                "adapter": request.source.adapter,
                "top_k": request.top_k,
                "heatmaps": heatmaps,
            }
            about = {"settings": settings, "versions": versions(), "counts": counts, "seconds": seconds}
            gallery = None if page is None else MatchReport(folder, matcher, heatmaps)
            with ScoreFile(table, metadata(settings)) as scores:
                entries = _Entries(rows, images, captions, scores, request.top_k, gallery, interrupt)

                def end() -> dict[str, Any]:
                    complete = not counts["not_reached"] and not (interrupt is not None and interrupt.requested)
                    scores.close(complete)
                    return {"complete": complete, "heatmap_seconds": entries.drawing if heatmaps else 0.0}

                head = {"command": "match", **about, "captions": list(captions)}
                tail = stream_json(results, head, "images", entries.made(ids), end)
            summary = {**about, **tail, "shown": entries.shown, "errors": entries.errors}
            if page is not None and gallery is not None:
                page.write(gallery.page(summary))
    return summary


class _Entries:
    """Makes the entries of results.json, and beside them the rows of scores.parquet and the cards of the page.

    Attributes:
        shown: the first of images that have scores.
        errors: path, reason and message of the first others.
        drawing: seconds spent on heat maps and the page's pictures.
    """

    def __init__(
        self,
        rows: Rows,
        images: Sequence[Path],
        captions: Sequence[str],
        file: ScoreFile,
        top_k: int,
        gallery: MatchReport | None,
        interrupt: Interrupt | None,
    ) -> None:
        self._rows, self._images, self._captions, self._file = rows, images, captions, file
        self._top_k, self._gallery, self._interrupt = top_k, gallery, interrupt
        self._column = pa.array(captions, pa.string())
        self.shown: list[dict[str, Any]] = []
        self.errors: list[tuple[str, str, str]] = []
        self.drawing = 0.0

    def made(self, ids: Sequence[bytes]) -> Iterator[dict[str, Any]]:
        """Yields an entry for each image that has a row."""
        with ExitStack() as stack:
            advance = None
            if self._gallery is not None and self._gallery.heatmaps:
                display = stack.enter_context(progress("images"))
                task, advance = display.add_task("heat maps", total=len(ids), units=0), display.update
            for index, row in enumerate(ids):
                found = self._rows[row]
                if found is not None:
                    yield self._entry(index, storable(str(self._images[index])), found)
                if advance is not None:
                    advance(task, advance=1, units=index + 1)

    def _entry(self, index: int, path: str, found: NDArray[np.float32] | tuple[str, str]) -> dict[str, Any]:
        if isinstance(found, tuple):
            if len(self.errors) < _ERRORS:
                self.errors.append((path, *found))
            return {"path": path, "error": {"reason": found[0], "message": found[1]}}
        best = ranked(self._file.add(index, path, self._column, found), self._captions, found, self._top_k)
        if self._gallery is not None:
            start = time.perf_counter()
            self._gallery.stopped = self._interrupt is not None and self._interrupt.requested
            lowest, highest = float(found.min()), float(found.max())
            self._gallery.add(index, self._images[index], path, best, lowest, highest)
            self.drawing += time.perf_counter() - start
        entry = {"path": path, "ranked": best}
        if len(self.shown) < SHOWN:
            self.shown.append(entry)
        return entry
