"""A job killed at any moment and started again gives the files of a job that was left in peace."""

import os
import random
import signal
import time

import pytest

from dsd_fast.jobs import read_index
from tests.jobs.numbers import COUNT, check_readable, ended, files, run, start

# What changes a folder, or what it holds after a power failure.
CALLS = ("replace", "fsync", "mkdir", "rmdir")


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """A kill, unlike a power failure, takes nothing back that was written; what is forced to the disk takes long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def count_calls(act) -> None:
    """From now on each of the CALLS is preceded by ``act(n)``, n from 0."""
    count = 0

    def counted(call):
        def before(*arguments, **options):
            nonlocal count
            act(count)
            count += 1
            return call(*arguments, **options)

        return before

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before(folder, moment, **options) -> int:
    def child():
        count_calls(lambda number: kill() if number == moment else None)
        run(folder, **options)

    return ended(start(child))


def test_killed_at_every_change_of_the_folder(tmp_path):
    numbers = range(13)
    run(tmp_path / "whole", numbers)
    whole = files(tmp_path / "whole")
    moment, how = 0, signal.SIGKILL
    while how:
        folder = tmp_path / str(moment)
        how = killed_before(folder, moment, numbers=numbers)
        # Three shards of two files each, every one written, renamed and its folder's name made to last.
        assert how == signal.SIGKILL or (how == 0 and moment > 3 * 2 * 3)
        # Nothing is lost but the shards that were being filled or written.
        assert not folder.exists() or len(check_readable(folder)) in (0, 5, 10, 13)
        run(folder, numbers)
        assert files(folder) == whole, f"killed before change {moment}"
        moment += 1


@pytest.mark.alone
def test_killed_again_and_again_by_the_clock(tmp_path):
    run(tmp_path / "whole")
    whole = files(tmp_path / "whole")
    draw, folder = random.Random(0), tmp_path / "killed"
    kills = 0
    while kills < 20:
        child = start(lambda: run(folder, each=lambda number: time.sleep(0.002)))
        time.sleep(draw.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        how = ended(child)
        assert how in (0, signal.SIGKILL)
        kills += how == signal.SIGKILL
    run(folder)
    assert files(folder) == whole


def test_a_job_that_goes_on_after_a_kill_makes_only_what_is_missing(tmp_path):
    def child():
        run(tmp_path, each=lambda number: kill() if number == 17 else None)

    assert ended(start(child)) == signal.SIGKILL
    made = []
    run(tmp_path, each=made.append)
    # Of the three full shards one may have waited while another was being written.
    assert made[0] in (5, 10, 15)
    assert made == list(range(made[0], COUNT))


@pytest.mark.parametrize("moment", range(3, 30, 4))
def test_a_killed_worker_among_others(tmp_path, moment):
    for worker in range(4):
        run(tmp_path / "whole", worker=worker, workers=4)
    how = [killed_before(tmp_path / "killed", moment + worker, worker=worker, workers=4) for worker in range(4)]
    assert set(how) <= {0, signal.SIGKILL}
    for worker in (2, 0, 3, 1):
        run(tmp_path / "killed", worker=worker, workers=4)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert {row["number"] for row in check_readable(tmp_path / "killed")} == set(range(COUNT))


def test_one_goes_on_after_killed_workers_and_leaves_nothing_of_theirs(tmp_path):
    # Between the data's name and the index's, where both the data file and the index's temporary file are left.
    for moment in range(8, 14):
        folder = tmp_path / str(moment)
        how = [killed_before(folder, moment, worker=worker, workers=4) for worker in range(4)]
        assert signal.SIGKILL in how
        run(folder)
        rows = check_readable(folder)
        assert {row["number"] for row in rows} == set(range(COUNT))
        shards = {row["shard"] for row in rows}
        assert set(files(folder)) == {"manifest.json"} | {
            name for shard in shards for name in (f"shards/{shard}.npy", f"index/{shard}.parquet")
        }


def test_errors_tried_again_survive_a_kill(tmp_path):
    for moment in range(0, 24, 3):
        folder = tmp_path / str(moment)
        run(folder)
        killed_before(folder, moment, retry_errors=True, bad=())
        run(folder, retry_errors=True, bad=())
        rows = {row["number"]: row["status"] for row in read_index(folder).to_pylist()}
        assert rows == dict.fromkeys(range(COUNT), "ok")
