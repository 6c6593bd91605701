"""What Ray's actors are given to do, in a module that they import quickly."""

import os
import signal
from dataclasses import asdict
from pathlib import Path

from dsd_fast.jobs import ManifestError
from tests.jobs.numbers import COUNT, run


def once(file: Path) -> bool:
    """Whether this is the first of all processes that asks."""
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def work(folder: Path):
    """Makes a task that does what the name of a file says."""

    def task(worker, workers, progress):
        if (folder / "dies").exists() and worker == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if (folder / "refused").exists() and worker == 1:
            raise ManifestError("it is of another job")
        return {"inputs": 2 * worker}

    return task


def numbers_of(folder: Path, killed: Path | None = None):
    """The work of an actor; the first that comes to the last number of all dies."""

    def each(number: int) -> None:
        if killed is not None and number == COUNT - 1 and once(killed):
            os.kill(os.getpid(), signal.SIGKILL)

    def task(worker, workers, progress):
        counts = run(folder, each=each, worker=worker, workers=workers, shard_rows=2)
        progress(counts.inputs)
        return asdict(counts)

    return task
