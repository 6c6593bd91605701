"""One writer to a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = ".lock"


class LockedError(RuntimeError):
    """Another process writes to the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process that asks for the lock of ``folder`` has it inside the block; the folder is made if missing.

    The system lets go of the lock of a process that dies, however it dies.

    Raises:
        LockedError: another process has it.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(f"{folder} is being written by another process or thread") from None
        yield
    finally:
        os.close(descriptor)
