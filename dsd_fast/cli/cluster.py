"""A command's job: in this process, as one of several workers perhaps, or by Ray in many."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dsd_fast.cli.options import WorkerOptions
from dsd_fast.cli.terminal import CommandError, progress
from dsd_fast.jobs import JobError


class Work(Protocol):
    """What a process that works has loaded."""

    def __call__(self, worker: int, workers: int, progress: Callable[[int], None], /) -> Mapping[str, float]:
        """Runs a :class:`dsd_fast.jobs.Job` as this worker.

        Args:
            worker, workers: of the job.
            progress: called with the number of inputs that are dealt with, now and then.

        Returns:
            Numbers of which sums over workers mean something, "inputs" among them.
        """


W = TypeVar("W", bound=Work)


def run(
    options: WorkerOptions,
    make: Callable[[], W],
    out: Path,
    *,
    total: int,
    unit: str,
    finish: Callable[[W, dict[str, Any]], Mapping[str, Any] | None] | None = None,
) -> dict[str, Any] | None:
    """Runs a job to its end, with its progress on stderr; Ctrl-C ends it early, and the same command goes on.

    Args:
        options: checked by :meth:`WorkerOptions.check`.
        make: gives the work, and loads what it needs; with Ray it travels, so it is a function of a module, or a
            `functools.partial` of one, with groups of options, paths and small values as arguments.
        out: the job's folder.
        total: inputs of all workers.
        unit: of the inputs, as "images".
        finish: called as ``finish(work, numbers)`` after all workers of this run, in a process that has the work;
            what it returns is added to the numbers.

    Returns:
        The sums of the numbers, and "seconds", the time that the work took; None after Ctrl-C.

    Raises:
        CommandError: `out` belongs to another job or cannot be written.
    """
    try:
        worker, workers = options.share()
        work = make()
        start = time.perf_counter()
        with progress(unit) as display:
            # A share that is about this worker's; how many they are shows at the end.
            task = display.add_task(unit, total=-(-total // workers), units=0)

            def show(done: int) -> None:
                display.update(task, completed=done, units=done)

            try:
                numbers: dict[str, Any] = dict(work(worker, workers, show))
            except KeyboardInterrupt:
                return None
            display.update(task, total=numbers["inputs"])
        numbers["seconds"] = time.perf_counter() - start
        if finish is not None:
            numbers |= finish(work, numbers) or {}
        return numbers
    except JobError as error:
        raise CommandError(f"--out {error}") from error
