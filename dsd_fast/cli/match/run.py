"""A matching run: images through a Matcher into a job's folder, and the results of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from dsd_fast.cli import cluster
from dsd_fast.cli.files import writing
from dsd_fast.cli.images import ImageFiles
from dsd_fast.cli.match.captions import captions_of, check_lengths
from dsd_fast.cli.match.options import MatchRequest
from dsd_fast.cli.match.results import check_names, write_results
from dsd_fast.cli.terminal import CommandError, Interrupt
from dsd_fast.engine.items import Items, prompt_check
from dsd_fast.matching import Matcher
from dsd_fast.matching.export import score_to


def run(request: MatchRequest, captions: Sequence[str]) -> dict[str, Any]:
    """Scores every image with every caption; Ctrl-C ends it early, with what has been scored.

    The model is loaded once the folder is known to be writable.

    Returns:
        The counts of the run, see :class:`dsd_fast.jobs.Counts`, the "seconds" that scoring took, and as "results" what
        :func:`write_results` returns.

    Raises:
        CommandError: `out` belongs to another job or cannot be written; images that are not there; captions or a memory
            budget that allow no heat maps.
        KeyboardInterrupt: before there was anything to keep.
        ValueError: settings, captions, a runtime or a memory budget that do not fit the model.
    """
    out = request.out
    files = ImageFiles(request.images, without=out)
    # What travels is small.
    make = partial(Matching, request)
    with Interrupt() as interrupt:
        if request.workers.engine is None:
            make = partial(Matching, request, captions, files, interrupt)
        numbers = cluster.run(request.workers, make, out, total=len(files), unit="images", finish=Matching.results)
    if numbers is None or "results" not in numbers:
        raise KeyboardInterrupt
    return numbers


class Matching:
    """The work of the command, with all that it needs loaded.

    Args:
        captions, files: those of the request; found where not given.
        interrupt: that ends the scoring early.
    """

    def __init__(
        self,
        request: MatchRequest,
        captions: Sequence[str] | None = None,
        files: ImageFiles | None = None,
        interrupt: Interrupt | None = None,
    ) -> None:
        self.request, self.interrupt = request, interrupt
        self.captions = captions or captions_of(request)
        self.files = files or ImageFiles(request.images, without=request.out)
        request.source.check()
        request.memory.check(request.source.device)
        with writing(request.out):
            check_names(request.out)
        model = request.source.load()
        check_lengths(model, self.captions)
        self.matcher = request.memory.compiled(Matcher(model, request.score.config(request.memory)))
        if request.heatmaps:
            try:
                # What refuses them is found here rather than after hours of scoring.
                self.matcher.check_heatmaps(self.captions)
            except ValueError as error:
                raise CommandError(f"--heatmaps: {error}") from error
        self._ids: list[bytes] = []

    def __call__(self, worker: int, workers: int, progress: Callable[[int], None], /) -> dict[str, Any]:
        """Scores one worker's images."""
        self._ids = []
        exported = score_to(
            self.matcher,
            self.request.out,
            self.files,
            self.captions,
            names=self.files.names,
            shard_rows=self.request.files.shard_rows,
            worker=worker,
            workers=workers,
            retry_errors=self.request.files.retry_errors,
            progress=progress,
            seen=self._seen,
            until=iter if self.interrupt is None else self.interrupt.until,
        )
        return {**asdict(exported.counts), "compute": exported.compute_seconds}

    def results(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the results of all workers, see :func:`write_results`; none where Ctrl-C came before a new row."""
        interrupted = self.interrupt is not None and self.interrupt.requested
        if interrupted and not numbers["ok"] + numbers["errors"]:
            return {}
        if not self._ids:
            # Of a process in which none of the workers ran.
            config = self.matcher.config
            for item in Items(self.files, "", config.seed, self.files.names, prompt_check(self.matcher.model)):
                self._seen(item.id)
        # Of one process without what comes before and after; of many these overlap.
        seconds = numbers["compute" if self.request.workers.engine is None else "seconds"]
        written = write_results(
            self.request, self.captions, self.matcher, self.files, self._ids, seconds, self.interrupt
        )
        return {"results": written, "seconds": seconds}

    def _seen(self, row: str) -> None:
        self._ids.append(bytes.fromhex(row))
