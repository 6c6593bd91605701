"""One writer to a folder, or several that share its work."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dsd_fast.jobs.errors import LockedError

NAME = ".lock"
_WORKER = re.compile(r"\.lock-(\d+)of(\d+)")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process that asks for the lock of ``folder`` has it inside the block; the folder is made if missing.

    The system lets go of the lock of a process that dies, however it dies.

    Raises:
        LockedError: another process has it.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / NAME, fcntl.LOCK_EX, f"{folder} is being written by another process or thread"):
        yield


@contextmanager
def locked_worker(folder: Path, worker: int, workers: int) -> Iterator[None]:
    """As :func:`locked`, for one of several workers: others of the same ``workers`` have the folder at the same time.

    Raises:
        LockedError: this worker, or one of another number of workers, or a single writer has it.
        OSError: the folder cannot be written.
    """
    if workers == 1:
        with locked(folder):
            yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        alone = f"{folder} is being written by another process, which is not one of {workers} workers"
        stack.enter_context(_held(folder / NAME, fcntl.LOCK_SH, alone))
        own = folder / f"{NAME}-{worker}of{workers}"
        stack.enter_context(_held(own, fcntl.LOCK_EX, f"{folder} is being written by worker {worker} of {workers}"))
        # After the own lock is held: of two that start at once, at least one sees the other.
        for file in sorted(folder.glob(f"{NAME}-*")):
            found = _WORKER.fullmatch(file.name)
            if found and int(found[2]) != workers:
                other = f"{folder} is being written by worker {found[1]} of {found[2]}, and this is one of {workers}"
                with _held(file, fcntl.LOCK_SH, other):
                    pass
        _ended(folder, worker, workers).unlink(missing_ok=True)
        yield


def mark_ended(folder: Path, worker: int, workers: int) -> None:
    """Notes that a worker, which has its lock, has made all its rows; :func:`locked_worker` takes that back.

    Raises:
        OSError: the folder cannot be written.
    """
    if workers > 1:
        _ended(folder, worker, workers).touch()


def all_ended(folder: Path, workers: int) -> bool:
    """Tells whether each of several workers has made all its rows; of two that end at once, both may see it."""
    return workers == 1 or all(_ended(folder, worker, workers).exists() for worker in range(workers))


def _ended(folder: Path, worker: int, workers: int) -> Path:
    return folder / f"{NAME}-{worker}of{workers}-ended"


@contextmanager
def waiting(folder: Path, name: str = "start") -> Iterator[None]:
    """One at a time of those that share the folder, which wait for each other, so that none may take long.

    Args:
        folder: exists.
        name: of what they wait for.

    Raises:
        OSError: the folder cannot be written.
    """
    with _held(folder / f"{NAME}-{name}", fcntl.LOCK_EX):
        yield


@contextmanager
def _held(file: Path, mode: int, otherwise: str | None = None) -> Iterator[None]:
    """Waits for the lock of a file, or raises a LockedError that says ``otherwise``."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, mode if otherwise is None else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(otherwise) from None
        yield
    finally:
        os.close(descriptor)
