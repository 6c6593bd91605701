"""What Ray's actors are given to do, in a module that they import quickly."""

import os
import signal
from dataclasses import asdict
from pathlib import Path

from dsd_fast.jobs import ManifestError

SHARD_ROWS = 2


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


def images_of(folder: Path, rows: int, killed: Path | None = None):
    """Generates images of a partition; of all actors the first that has made so many dies, its first shard whole.

    A shard is handed over when few are ahead of it, so the first one is on the disk when the third is handed over.
    """
    # What other cases do not wait for.
    import dsd_fast as dsd
    from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler
    from dsd_fast.generation.export import generate_to
    from tests.tiny import tiny_pipeline

    sampler = Sampler(dsd.from_pipeline(tiny_pipeline("sd15")), GenerateConfig(steps=1, guidance=2.0))

    def task(worker, workers, progress):
        def told(done: int) -> None:
            progress(done)
            if killed is not None and done >= 3 * SHARD_ROWS and once(killed):
                os.kill(os.getpid(), signal.SIGKILL)

        made = generate_to(
            sampler,
            (GenerateRow("a red cat", seed) for seed in range(rows)),
            folder,
            shard_rows=SHARD_ROWS,
            batch=2,
            worker=worker,
            workers=workers,
            closes=False,
            progress=told,
        )
        return asdict(made.counts)

    return task
