"""Which worker a process is, and what a command hands to Ray; Ray itself is in tests/jobs/test_ray.py."""

import json
from functools import partial

import pytest

from dsd_fast.cli import cluster
from dsd_fast.cli.options import WorkerOptions
from dsd_fast.cli.terminal import CommandError
from dsd_fast.jobs import LockedError

NAMES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_ARRAY_TASK_ID")


@pytest.mark.parametrize(
    ("options", "environment", "share"),
    [
        ({}, {}, (0, 1)),
        ({"workers": 3}, {}, (0, 3)),
        ({"worker": "2", "workers": 3}, {"RANK": "1", "WORLD_SIZE": "2"}, (2, 3)),
        ({"worker": "auto"}, {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"worker": "auto", "workers": 2}, {"RANK": "0", "WORLD_SIZE": "2"}, (0, 2)),
        ({"worker": "auto"}, {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (3, 4)),
        # torchrun, in what srun has started; then the array does not matter.
        (
            {"worker": "auto"},
            {"RANK": "5", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "2"},
            (5, 8),
        ),
    ],
)
def test_which_worker_this_is(monkeypatch, options, environment, share):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = WorkerOptions(**options)
    options.check("cpu")
    assert options.share() == share


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({"worker": "3", "workers": 3}, {}, "--worker: got 3, expected below --workers, 3"),
        ({"worker": "-1"}, {}, "--worker: got '-1', expected a number from 0, or auto"),
        ({"worker": "auto"}, {"RANK": "1"}, "--worker auto: neither RANK and WORLD_SIZE nor SLURM_PROCID and"),
        (
            {"worker": "auto"},
            {"RANK": "2", "WORLD_SIZE": "2"},
            "--worker auto: RANK is '2' and WORLD_SIZE '2', ",
        ),
        (
            {"worker": "auto"},
            {"RANK": "x", "WORLD_SIZE": "2"},
            "--worker auto: RANK is 'x' and WORLD_SIZE '2', ",
        ),
        (
            {"worker": "auto", "workers": 3},
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"},
            "--workers: got 3, expected 4, as SLURM_NTASKS says, or none",
        ),
        (
            {"worker": "auto"},
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "7"},
            "--worker auto: this is a task of a SLURM array, expected --worker $SLURM_ARRAY_TASK_ID and --workers",
        ),
        ({"engine": "dask"}, {}, "--engine: got 'dask', expected ray"),
        ({"partitions": 4}, {}, "--partitions: given without --engine ray"),
        ({"gpus_per_worker": 1}, {}, "--gpus-per-worker: given without --engine ray"),
        ({"address": "auto"}, {}, "--address: given without --engine ray"),
        ({"engine": "ray", "worker": "0"}, {}, "--worker: given with --engine ray, which numbers the workers itself"),
        (
            {"engine": "ray", "gpus_per_worker": 0.5},
            {},
            "--gpus-per-worker: got 0.5 with --device cpu, expected",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(monkeypatch, options, environment, message):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CommandError) as error:
        WorkerOptions(**options).check("cpu")
    assert message in str(error.value)


def test_a_gpu_needs_to_be_asked_for():
    with pytest.raises(CommandError, match="--gpus-per-worker: got 0 with --device cuda, expected GPUs for cuda"):
        WorkerOptions(engine="ray").check("cuda")
    WorkerOptions(engine="ray", gpus_per_worker=1).check("cuda:0")


class Work:
    """Says what it was asked, and fails where it shall."""

    def __init__(self, fails=None):
        self.fails = fails

    def __call__(self, worker, workers, progress, /):
        progress(worker)
        if self.fails == worker:
            raise CommandError("what a command says")
        return {"inputs": 1, "elsewhere": workers - 1, "places": worker}


def finish(work, numbers):
    return {"end": [type(work).__name__, numbers["places"]]}


@pytest.fixture
def rays(monkeypatch):
    """Ray in this process, with what it was asked for; what travels is taken apart and put together again."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    asked = []

    def run_on_ray(make, *, partitions, workers, progress=lambda done: None, **options):
        asked.append({"partitions": partitions, "workers": workers, **options})
        work = cloudpickle.loads(cloudpickle.dumps(make))()
        return [json.loads(json.dumps(work(each, partitions, progress))) for each in range(partitions)]

    monkeypatch.setattr("dsd_fast.jobs.ray.run_on_ray", run_on_ray)
    return asked


def test_ray_makes_all_partitions_and_ends_them_where_the_work_is(rays, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = WorkerOptions(engine="ray", workers=2, address="auto", gpus_per_worker=0.5)
    numbers = cluster.run(options, Work, tmp_path / "out", total=8, unit="images", finish=finish)
    assert numbers.pop("seconds") >= 0
    assert numbers == {"inputs": 8, "elsewhere": 0, "places": sum(range(8)), "end": ["Work", sum(range(8))]}
    where = {"address": "auto", "gpus_per_worker": 0.5}
    assert rays == [{"partitions": 8, "workers": 2, **where}, {"partitions": 1, "workers": 1, **where}]
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_work_says_elsewhere_is_said_here(rays, tmp_path):
    options = WorkerOptions(engine="ray", partitions=3)
    with pytest.raises(ValueError, match=r"^what a command says$"):
        cluster.run(options, partial(Work, fails=2), tmp_path, total=8, unit="images")
    assert list(tmp_path.iterdir()) == []


def test_nodes_that_see_other_files_are_refused(tmp_path, monkeypatch):
    here = str(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"does not see what was written into .*out, expected a folder of a file sys"):
        cluster._Elsewhere(Work, here, tmp_path / "out" / ".seen")
    with pytest.raises(ValueError, match=r"gone, where the command was started, is not on the node .*: No such file"):
        cluster._Elsewhere(Work, str(tmp_path / "gone"), tmp_path)


def test_ctrl_c_and_a_folder_that_is_taken(tmp_path):
    def interrupted():
        return lambda worker, workers, progress: (_ for _ in ()).throw(KeyboardInterrupt)

    def taken():
        return lambda worker, workers, progress: (_ for _ in ()).throw(LockedError("it is being written"))

    assert cluster.run(WorkerOptions(), interrupted, tmp_path, total=1, unit="images") is None
    with pytest.raises(CommandError, match=r"^--out it is being written$"):
        cluster.run(WorkerOptions(), taken, tmp_path, total=1, unit="images")
