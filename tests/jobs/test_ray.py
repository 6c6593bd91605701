"""Partitions of a job by real Ray actors: what one process makes in turn, and sentences for what would hang or die."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from dsd_fast.features import ExtractBatch
from dsd_fast.generation.closing import close
from dsd_fast.jobs import JobError, LockedError, ManifestError, read_index
from dsd_fast.jobs.lock import locked_worker
from dsd_fast.jobs.ray import _start, _Worker, run_on_ray
from tests.engine.batches import encoded, objects, pictures
from tests.jobs.numbers import files
from tests.jobs.partitions import SHARD_ROWS, images_of, work

ray = pytest.importorskip("ray")
PARTITIONS, ACTORS = 4, 2


@pytest.fixture(scope="module")
def cluster():
    """A Ray with room for two actors."""
    ray.init(
        address="local",
        num_cpus=ACTORS + 1,
        object_store_memory=128 << 20,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


def test_a_partition_whose_actor_was_killed_is_taken_up_again(cluster, tmp_path):
    """Byte for byte what one process makes that runs the same partitions in turn."""
    rows, told = 24, []
    make = partial(images_of, tmp_path / "rays", rows, tmp_path / "killed")
    found = run_on_ray(make, partitions=PARTITIONS, workers=ACTORS, progress=told.append)
    assert (tmp_path / "killed").exists()
    assert [each["inputs"] + each["elsewhere"] for each in found] == [rows] * PARTITIONS
    assert sum(each["inputs"] for each in found) == told[-1] == rows
    # What the killed actor had written was not made again.
    assert sum(each["done"] for each in found) >= SHARD_ROWS
    task = images_of(tmp_path / "whole", rows)
    for worker in range(PARTITIONS):
        task(worker, PARTITIONS, lambda done: None)
    assert close(tmp_path / "rays") == close(tmp_path / "whole")
    assert len(read_index(tmp_path / "whole")) == rows
    assert files(tmp_path / "rays") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("refused", ManifestError, "^it is of another job$"),
        (
            "dies",
            JobError,
            "^partitions 1 of 2 are not made: 3 actors died at each, as they do without memory; the oth",
        ),
    ],
)
def test_what_a_partition_raises_comes_back_as_its_sentence(cluster, tmp_path, case, kind, message):
    (tmp_path / case).touch()
    with pytest.raises(kind, match=message):
        run_on_ray(partial(work, tmp_path), partitions=2, workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "^workers: got 0, expected at least 1"),
        ({"partitions": 0}, "^partitions: got 0, expected at least 1"),
        ({"gpus_per_worker": -1}, "^gpus_per_worker: got -1, expected at least 0"),
        (
            {"workers": 3},
            r"^workers: got 3, each of 1 CPU and 0 GPUs, .* at most 2: Ray knows 3 CPUs, of which one stays",
        ),
        (
            {"gpus_per_worker": 0.5},
            r"^workers: got 2, each of 1 CPU and 0.5 GPUs, .* at most 0: .* and 0 GPUs, on 1 node",
        ),
        ({"address": "127.0.0.1:1"}, "^address: got '127.0.0.1:1', but Ray runs in this program"),
        (
            {"make": partial(work, bytes(1 << 20))},
            r"^make: takes 1,04\d,\d\d\d bytes to travel, expected at most 1,048,576",
        ),
    ],
)
def test_what_would_wait_for_ever_is_refused(cluster, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_on_ray(**{"make": partial(work, tmp_path), "partitions": 4, "workers": ACTORS, **options})


def test_what_cannot_be_made_comes_back_as_its_sentence(cluster):
    def make():
        raise FileNotFoundError("no model in words")

    row = _Worker(make, PARTITIONS, Counting(deaths=0))({"partition": [2]})
    assert row == {"partition": [2], "error": ["OSError"], "content": ["no model in words"]}


def test_no_cluster_at_the_address_is_said():
    with pytest.raises(ValueError, match=r"^address: no Ray cluster can be joined at '127.0.0.1:1': .* refused"):
        _start("127.0.0.1:1", 1)


class Counting:
    """Stands in for the actor that counts."""

    def __init__(self, deaths):
        self.begin = self.advance = self
        self.deaths = deaths

    def remote(self, *arguments):
        return ray.put(1 + self.deaths)


@pytest.mark.parametrize("deaths", [0, 1])
def test_a_partition_waits_for_the_lock_of_a_dead_one_and_then_says_it(cluster, tmp_path, monkeypatch, deaths):
    tries = []

    def task(worker, workers, progress):
        tries.append(worker)
        with locked_worker(tmp_path, worker, workers):
            return {"inputs": 1}

    monkeypatch.setattr("dsd_fast.jobs.ray._REPORT_SECONDS", 0.1)
    monkeypatch.setattr("dsd_fast.jobs.ray._PATIENCE", 0.5)
    monkeypatch.setattr("dsd_fast.jobs.ray._PATIENCE_AFTER_DEATH", 60)
    actor = _Worker(lambda: task, PARTITIONS, Counting(deaths))
    with ThreadPoolExecutor(1) as pool:
        with locked_worker(tmp_path, 2, PARTITIONS):
            found = pool.submit(actor, {"partition": [2]})
            if not deaths:
                assert found.result()["error"] == [LockedError.__name__]
                assert found.result()["content"] == [f"{tmp_path} is being written by worker 2 of 4"]
            while len(tries) < 3:
                time.sleep(0.01)
        if deaths:
            assert found.result()["error"] == [""]


def test_a_class_for_batches_in_a_pipeline_of_ones_own(cluster):
    from ray.data import ActorPoolStrategy

    settings = {"layers": ("down-level0-repeat0-res-out",), "timesteps": (50,)}
    rows = [{"image": encoded(image), "key": number} for number, image in enumerate(pictures(3))]
    answered = ray.data.from_items(rows, override_num_blocks=2).map_batches(
        ExtractBatch, fn_constructor_kwargs=settings, batch_size=2, compute=ActorPoolStrategy(size=1)
    )
    found = {row["key"]: row for row in answered.take_all()}
    own = ExtractBatch(**settings)({"image": objects([row["image"] for row in rows])})
    assert sorted(found) == [0, 1, 2]
    for number, row in found.items():
        assert set(row) == {"key", "error", *settings["layers"]}
        assert row["error"] == ""
        for layer in settings["layers"]:
            # Batches of other sizes: convolutions agree to 1e-5 of the largest activation.
            assert np.abs(row[layer] - own[layer][number]).max() <= 1e-5 * np.abs(own[layer]).max()
