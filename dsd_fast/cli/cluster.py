"""A command's job: in this process, as one of several workers perhaps, or by Ray in many."""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dsd_fast.cli.files import writing
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
            what it returns, as JSON knows it, is added to the numbers.

    Returns:
        The sums of the numbers, and "seconds", the time that the work took; None after Ctrl-C.

    Raises:
        CommandError: `out` belongs to another job or cannot be written.
    """
    try:
        if options.engine is not None:
            return _run_on_ray(options, make, out, total, unit, finish)
        worker, workers = options.share()
        work = make()
        start = time.perf_counter()
        # A share that is about this worker's; how many they are shows at the end.
        with _counted(unit, -(-total // workers)) as show:
            try:
                numbers: dict[str, Any] = dict(work(worker, workers, show))
            except KeyboardInterrupt:
                return None
            show(int(numbers["inputs"]), last=True)
        numbers["seconds"] = time.perf_counter() - start
        if finish is not None:
            numbers |= finish(work, numbers) or {}
        return numbers
    except JobError as error:
        raise CommandError(f"--out {error}") from error


class _Show(Protocol):
    def __call__(self, done: int, /, *, last: bool = False) -> None: ...


@contextmanager
def _counted(unit: str, total: int) -> Iterator[_Show]:
    """A progress display, and what moves it."""
    with progress(unit) as display:
        task = display.add_task(unit, total=total, units=0)

        def show(done: int, /, *, last: bool = False) -> None:
            display.update(task, completed=done, units=done, total=done if last else None)

        yield show


def _run_on_ray(
    options: WorkerOptions,
    make: Callable[[], W],
    out: Path,
    total: int,
    unit: str,
    finish: Callable[[W, dict[str, Any]], Mapping[str, Any] | None] | None,
) -> dict[str, Any] | None:
    from dsd_fast.jobs.ray import run_on_ray

    workers = options.workers or 1
    start = time.perf_counter()
    seen = out.absolute() / f".seen-{secrets.token_hex(4)}"
    with writing(out):
        seen.touch()
    there = partial(_Elsewhere, make, os.getcwd(), seen)
    try:
        run = partial(run_on_ray, address=options.address, gpus_per_worker=options.gpus_per_worker or 0)
        try:
            with _counted(unit, total) as show:
                parts = run(there, partitions=options.partitions or 4 * workers, workers=workers, progress=show)
        except KeyboardInterrupt:
            return None
        # Of a partition's inputs those of the others are elsewhere.
        sums = Counter[str]()
        for part in parts:
            sums.update(part)
        numbers: dict[str, Any] = {**sums, "elsewhere": 0, "seconds": time.perf_counter() - start}
        if finish is not None:
            # A node has the device that the work needs; this one perhaps not.
            numbers |= run(partial(_Finish, there, finish, numbers), partitions=1, workers=1)[0]
    finally:
        seen.unlink(missing_ok=True)
    return numbers


class _Elsewhere:
    """The work in a process of another node, which may see other files."""

    def __init__(self, make: Callable[[], W], folder: str, seen: Path) -> None:
        try:
            os.chdir(folder)
        except OSError as error:
            raise ValueError(
                f"{folder}, where the command was started, is not on the node {platform.node()}: {error.strerror}; "
                "expected a folder of a file system that all nodes share"
            ) from None
        if not seen.exists():
            raise ValueError(
                f"--out: the node {platform.node()} does not see what was written into {seen.parent}, expected a "
                "folder of a file system that all nodes share"
            )
        with _told():
            self.work = make()

    def __call__(self, worker: int, workers: int, progress: Callable[[int], None], /) -> Mapping[str, float]:
        with _told():
            return self.work(worker, workers, progress)


class _Finish:
    """The end of the work, in a process of another node."""

    def __init__(
        self, make: Callable[[], _Elsewhere], finish: Callable[..., Mapping[str, Any] | None], numbers: dict[str, Any]
    ) -> None:
        self.work, self.finish, self.numbers = make().work, finish, numbers

    def __call__(self, worker: int, workers: int, progress: Callable[[int], None], /) -> Mapping[str, Any]:
        with _told():
            return self.finish(self.work, self.numbers) or {}


@contextmanager
def _told() -> Iterator[None]:
    """What ends a command ends it from another process too."""
    try:
        yield
    except CommandError as error:
        raise ValueError(str(error)) from error
