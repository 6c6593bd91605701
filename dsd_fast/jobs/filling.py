"""From a job's items to its rows: what is pending is computed some at a time, and written beside that."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dsd_fast.jobs.job import Counts, Job

Item = TypeVar("Item")
Result = TypeVar("Result")
Parts = Iterator[Iterable[Result]]


@dataclass(frozen=True)
class Exported:
    """What filling a job's folder came to.

    Attributes:
        folder: that holds the results.
        counts: what became of the inputs.
        compute_seconds: spent on results, reading that was waited for included.
        write_seconds: spent on writing, by its own thread.
        overlap: share of the writing that went on while results were computed.
    """

    folder: Path
    counts: Counts
    compute_seconds: float
    write_seconds: float
    overlap: float

    @classmethod
    def of(cls, job: Job) -> Exported:
        """Tell it of a job that has ended."""
        line = job.timeline
        seconds = line.seconds("compute"), line.seconds("write")
        return cls(job.folder, job.counts, *seconds, line.overlap("write", "compute"))


def fill(
    job: Job,
    items: Iterable[Item],
    key: Callable[[Item], str],
    compute: Callable[[Iterator[Item]], Generator[Iterable[Result]]],
    settle: Callable[[Item, Result], None],
    *,
    progress: Callable[[int], None] | None = None,
    until: Callable[[Parts[Result]], Parts[Result]] = iter,
) -> None:
    """Makes the rows of a job's pending items, inside its block; memory does not grow with them.

    Args:
        key: gives an item's id.
        compute: called once with the pending items, which it takes as it needs them; yields the results of some of
            them at a time, one each, in their order. It is closed when the job ends early.
        settle: called with each item and its result; puts the row into the job, :meth:`Job.put` or :meth:`Job.fail`.
        progress: called with the number of this worker's inputs that are dealt with, now and then.
        until: passes the parts on, and may end early: the rows of those that it has passed on are kept.
    """
    waiting: deque[Item] = deque()

    def pending() -> Iterator[Item]:
        for item in job.pending(items, key):
            waiting.append(item)
            yield item

    # Nothing goes on decoding when the job ends early.
    with closing(compute(pending())) as parts:
        for part in until(_timed(job, parts)):
            for result in part:
                settle(waiting.popleft(), result)
            if progress is not None:
                progress(job.counts.inputs - len(waiting))
    if progress is not None:
        progress(job.counts.inputs - len(waiting))


def _timed(job: Job, parts: Parts[Result]) -> Parts[Result]:
    while True:
        with job.timeline.span("compute"):
            part = next(parts, None)
        if part is None:
            return
        yield part
