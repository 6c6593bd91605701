"""Partitions of a job by real Ray actors: what one process makes in turn, and sentences for what would hang or die."""

import os
import signal
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from dsd_fast.jobs import JobError
from dsd_fast.jobs.lock import locked_worker
from dsd_fast.jobs.ray import run_on_ray
from tests.jobs.numbers import COUNT, NUMBERS, files, run

PARTITIONS, ACTORS = 4, 2


@pytest.fixture(scope="module")
def cluster():
    """A Ray with room for two actors."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    # Of the paths that Ray makes sockets of, which a system limits to about a hundred characters.
    with pytest.MonkeyPatch.context() as patched:
        ray.init(
            address="local", num_cpus=ACTORS + 1, object_store_memory=128 << 20, include_dashboard=False,
            log_to_driver=False, _node_ip_address="127.0.0.1",
        )  # fmt: skip
        yield
    ray.shutdown()


def once(file: Path) -> bool:
    """Whether this is the first of all processes that asks."""
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


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


def test_a_partition_whose_actor_was_killed_is_taken_up_again(cluster, tmp_path):
    for worker in range(PARTITIONS):
        run(tmp_path / "whole", worker=worker, workers=PARTITIONS, shard_rows=2)
    told = []
    make = partial(numbers_of, tmp_path / "rays", tmp_path / "killed")
    found = run_on_ray(make, partitions=PARTITIONS, workers=ACTORS, progress=told.append)
    assert (tmp_path / "killed").exists()
    assert files(tmp_path / "rays") == files(tmp_path / "whole")
    assert [each["inputs"] + each["elsewhere"] for each in found] == [len(NUMBERS)] * PARTITIONS
    assert sum(each["inputs"] for each in found) == told[-1] == len(NUMBERS)
    # What the killed actor had written was not made again.
    assert any(each["done"] for each in found)
