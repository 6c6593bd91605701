"""A small real job: the multiples of each number, as arrays; some numbers are bad and some come twice."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dsd_fast.jobs import Counts, Job, read_index, row_id

COUNT = 23
NUMBERS = [*range(COUNT), 4, 17]
BAD = {7, 15}
SETTINGS = {"width": 6}
SHARD_ROWS = 5


def identity(number: int) -> str:
    return row_id(b"number", str(number))


def multiples(number: int) -> np.ndarray:
    return np.arange(SETTINGS["width"], dtype=np.int64) * number


def write(files, rows) -> None:
    with files.open(suffix=".npy") as file:
        np.lib.format.write_array(file, np.stack([row.payload for row in rows]), allow_pickle=False)


def run(folder: Path, numbers=NUMBERS, each: Callable[[int], None] = lambda number: None, bad=BAD, **options) -> Counts:
    options = {"write": write, "columns": {"number": "int64"}, "shard_rows": SHARD_ROWS, **options}
    with Job(folder, "multiples", SETTINGS, **options) as job:
        for number in job.pending(numbers, identity):
            each(number)
            with job.timeline.span("compute"):
                row = multiples(number)
            if number in bad:
                job.fail(identity(number), f"n{number}", "unlucky", f"{number} is unlucky", number=number)
            else:
                job.put(identity(number), f"n{number}", row, number=number)
    return job.counts


def start(call: Callable[[], object]) -> int:
    """A new process, which prints what the call raises and ends with 1 then."""
    child = os.fork()
    if not child:
        code = 1
        try:
            if "torch" in sys.modules:
                # It makes its thread pool anew at the first use, which must not be by two threads at once.
                sys.modules["torch"].set_num_threads(1)
            call()
            code = 0
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Waits for a process: the signal that ended it, or minus its exit code."""
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def files(folder: Path) -> dict[str, bytes]:
    """The results: the timeline alone may differ from run to run, and locks hold nothing."""
    found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {
        name: file.read_bytes()
        for name, file in found.items()
        if not name.startswith(".lock") and not name.startswith("timeline")
    }


def check_readable(folder: Path) -> list[dict]:
    """What a reader sees, each row of it whole and right."""
    rows = read_index(folder).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["id"] == identity(row["number"])
        assert row["status"] == ("error" if row["number"] in BAD else "ok")
        if row["status"] == "ok":
            array = np.load(folder / "shards" / f"{row['shard']}.npy", allow_pickle=False)
            assert array[row["row"]].tolist() == multiples(row["number"]).tolist()
    return rows
