"""A matching run: images through a Matcher into a job's folder, and the results of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from dsd_fast.cli import cluster
from dsd_fast.cli.files import writing
from dsd_fast.cli.images import ImageFiles
from dsd_fast.cli.match.captions import check_lengths
from dsd_fast.cli.match.options import MatchRequest
from dsd_fast.cli.match.results import check_names, write_results
from dsd_fast.cli.terminal import CommandError, Interrupt
from dsd_fast.engine.items import Items, prompt_check
from dsd_fast.matching import MatchConfig, Matcher
from dsd_fast.matching.export import score_to


def run(request: MatchRequest, captions: Sequence[str], config: MatchConfig) -> dict[str, Any]:
    """Scores every image with every caption; Ctrl-C ends it early, with what has been scored.

    The model is loaded once the folder is known to be writable.

    Returns:
        The counts of the run, see :class:`dsd_fast.jobs.Counts`, its "seconds", and as "results" what
        :func:`write_results` returns.

    Raises:
        CommandError: `out` belongs to another job or cannot be written; images that are not there; captions or a memory
            budget that allow no heat maps.
        KeyboardInterrupt: before there was anything to keep.
        ValueError: settings, captions, a runtime or a memory budget that do not fit the model.
    """
    out = request.out
    files = ImageFiles(request.images, without=out)
    request.source.check()
    request.memory.check(request.source.device)
    with writing(out):
        check_names(out)
    make = partial(Matching, request, captions, config)
    with Interrupt() as interrupt:
        if request.workers.engine is None:
            make = partial(Matching, request, captions, config, files, interrupt)
        numbers = cluster.run(request.workers, make, out, total=len(files), unit="images", finish=Matching.results)
    if numbers is None or "results" not in numbers:
        raise KeyboardInterrupt
    return numbers


class Matching:
    """The work of the command, with all that it needs loaded.

    Args:
        files: those of the request; found where not given.
        interrupt: that ends the scoring early.
    """

    def __init__(
        self,
        request: MatchRequest,
        captions: Sequence[str],
        config: MatchConfig,
        files: ImageFiles | None = None,
        interrupt: Interrupt | None = None,
    ) -> None:
        self.request, self.captions, self.interrupt = request, captions, interrupt
        self.files = ImageFiles(request.images, without=request.out) if files is None else files
        model = request.source.load()
        check_lengths(model, captions)
        self.matcher = request.memory.compiled(Matcher(model, config))
        if request.heatmaps:
            try:
                # What refuses them is found here rather than after hours of scoring.
                self.matcher.check_heatmaps(captions)
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
        return asdict(exported.counts)

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
        written = write_results(
            self.request, self.captions, self.matcher, self.files, self._ids, numbers["seconds"], self.interrupt
        )
        return {"results": written}

    def _seen(self, row: str) -> None:
        self._ids.append(bytes.fromhex(row))
