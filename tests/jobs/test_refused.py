"""Disks that are full, folders that may not be written, and writers that meet."""

import os
import resource
import signal
import threading
import time

import numpy as np
import pytest

from dsd_fast.jobs import Counts, Job, JobError, LockedError, read_index
from tests.jobs.numbers import COUNT, SETTINGS, check_readable, ended, files, identity, run, start


def refused(child):
    """What a new process is refused with, in words; it must end, and by itself."""
    reader, writer = os.pipe()

    def call():
        try:
            child()
        except JobError as error:
            os.write(writer, str(error).encode())

    pid = start(call)
    os.close(writer)
    with os.fdopen(reader) as stream:
        words = stream.read()
    assert ended(pid) == 0
    return words


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(tmp_path):
    """A limit on the size of files stands in for a disk that is full."""

    def write(files, rows):
        # The third shard is larger than the limit.
        with files.open(suffix=".npy") as file:
            np.lib.format.write_array(file, np.stack([row.payload for row in rows]), allow_pickle=False)
            file.write(bytes(10_000) if rows[0].payload[1] >= 10 else b"")

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
        run(tmp_path / "full", write=write)

    assert refused(child) == (
        f"{tmp_path / 'full'} cannot be written: File too large; "
        "10 rows are safe, and the same command goes on from there"
    )
    # No trace of the third shard.
    assert len([name for name in files(tmp_path / "full") if name.startswith("shards/")]) == 2
    assert not [name for name in files(tmp_path / "full") if ".tmp" in name]
    assert [row["number"] for row in check_readable(tmp_path / "full")] == list(range(10))
    assert run(tmp_path / "full", write=write).done == 10
    run(tmp_path / "whole", write=write)
    assert files(tmp_path / "full") == files(tmp_path / "whole")


def test_a_disk_full_at_the_index_leaves_no_data_file(tmp_path):
    def child():
        # Data files have 128 bytes and 48 a row; an index has more.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))
        run(tmp_path)

    assert "File too large; 0 rows are safe" in refused(child)
    assert set(files(tmp_path)) == {"manifest.json"}
    assert run(tmp_path).ok == 21


def lose_rights(folder):
    """From now on this process may not write to the folder, nor is it allowed to change that as root."""
    for place in (folder, *(each for each in folder.rglob("*") if each.is_dir())):
        place.chmod(0o555)
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)


@pytest.fixture
def open_folder(tmp_path):
    """A folder that any user may reach, which is not so of those that pytest makes."""
    changed = [
        parent for parent in tmp_path.parents if parent.owner() == tmp_path.owner() and parent.stat().st_mode & 5 != 5
    ]
    modes = [(parent, parent.stat().st_mode) for parent in (tmp_path, *changed)]
    for parent, mode in modes:
        parent.chmod(mode | 5)
    yield tmp_path / "out"
    for parent, mode in modes:
        parent.chmod(mode)


def test_rights_that_are_lost_on_the_way_are_one_sentence(open_folder):
    def each(number):
        if number == 14:
            while len(list(open_folder.glob("index/*.parquet"))) < 2:
                time.sleep(0.001)
            lose_rights(open_folder)

    assert refused(lambda: run(open_folder, each=each)) == (
        f"{open_folder} cannot be written: Permission denied; 10 rows are safe, and the same command goes on from there"
    )
    for place in (open_folder, *(each for each in open_folder.rglob("*") if each.is_dir())):
        place.chmod(0o755)
    run(open_folder)
    assert len(check_readable(open_folder)) == COUNT


def test_a_folder_without_rights_is_refused_before_any_work(open_folder):
    def child():
        lose_rights(open_folder)
        run(open_folder, each=lambda number: os._exit(3))

    open_folder.mkdir()
    assert refused(child) == (
        f"{open_folder} cannot be written: Permission denied; 0 rows are safe, and the same command goes on from there"
    )


def test_a_file_in_the_way_is_said(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(JobError, match="out cannot be written: it is a file; 0 rows"):
        run(tmp_path / "out")


def test_an_error_of_the_job_itself_is_its_own(tmp_path):
    def write(files, rows):
        with files.open(suffix=".npy") as file:
            file.write(b"half")
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        run(tmp_path, write=write)
    assert set(files(tmp_path)) == {"manifest.json"}
    assert run(tmp_path).ok == 21


class Held:
    """A job of another process that has the folder, until it is killed."""

    def __init__(self, folder, **options):
        reader, writer = os.pipe()

        def hold():
            with Job(folder, "multiples", SETTINGS, **options):
                os.write(writer, b".")
                signal.pause()

        self.child = start(hold)
        assert os.read(reader, 1) == b"."
        os.close(reader)
        os.close(writer)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.kill(self.child, signal.SIGKILL)
        assert ended(self.child) == signal.SIGKILL


@pytest.mark.parametrize(
    ("held", "asked", "message"),
    [
        ((0, 1), (0, 1), "is being written by another process or thread"),
        ((1, 4), (1, 4), "is being written by worker 1 of 4"),
        ((1, 4), (1, 3), "is being written by worker 1 of 4, and this is one of 3"),
        ((1, 4), (0, 1), "is being written by another process or thread"),
        ((0, 1), (1, 4), "is being written by another process, which is not one of 4 workers"),
    ],
)
def test_writers_that_do_not_share_the_work_are_refused_while_one_lives(tmp_path, held, asked, message):
    run(tmp_path, range(8))
    before = files(tmp_path)
    with Held(tmp_path, worker=held[0], workers=held[1]):
        with pytest.raises(LockedError, match=message):
            run(tmp_path, worker=asked[0], workers=asked[1])
        assert files(tmp_path) == before
    run(tmp_path, worker=asked[0], workers=asked[1])


def test_a_worker_leaves_the_files_of_living_workers_alone(tmp_path):
    shard = "000000-1of4-0123456789abcdef"
    with Held(tmp_path, worker=1, workers=4):
        for name in (f"shards/{shard}.npy", ".work-1of4/0.tmp"):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_bytes(b"half")
        run(tmp_path, worker=2, workers=4)
        assert (tmp_path / f"shards/{shard}.npy").exists()
        assert (tmp_path / ".work-1of4/0.tmp").exists()
    run(tmp_path, worker=1, workers=4)
    assert not (tmp_path / f"shards/{shard}.npy").exists()
    assert not (tmp_path / ".work-1of4").exists()


def test_two_that_start_at_once_have_one_manifest(tmp_path, monkeypatch):
    errors = []

    def worker(number, width):
        try:
            with Job(tmp_path, "multiples", {"width": width}, worker=number, workers=8):
                barrier.wait()
        except JobError as error:
            errors.append(str(error))
            barrier.wait()

    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=worker, args=(number, number % 2)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Whoever came first has decided; all that asked otherwise know.
    assert len(errors) == 4
    assert all("width" in error for error in errors)


def test_workers_that_start_at_once_clear_up_together(tmp_path):
    (tmp_path / ".work-0of1").mkdir()
    (tmp_path / "shards").mkdir()
    for number in range(200):
        (tmp_path / ".work-0of1" / f"{number}.tmp").touch()
        (tmp_path / "shards" / f"{number:06d}-0of1-0123456789abcdef.npy").touch()
    workers = [start(lambda worker=worker: run(tmp_path, worker=worker, workers=4)) for worker in range(4)]
    assert [ended(worker) for worker in workers] == [0] * 4
    assert not (tmp_path / ".work-0of1").exists()
    assert len(check_readable(tmp_path)) == COUNT
    assert {file.stem for file in (tmp_path / "shards").iterdir()} == {row["shard"] for row in check_readable(tmp_path)}


@pytest.mark.alone
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """A writer that is slower than what it writes is waited for."""
    shard_rows, size, count = 4, 1 << 20, 200

    def status(name):
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

    def write(files, rows):
        threading.Event().wait(0.002)
        with files.open(suffix=".bin") as file:
            for row in rows:
                file.write(row.payload)

    def child():
        before = status("VmRSS:")
        with Job(tmp_path, "multiples", SETTINGS, write=write, shard_rows=shard_rows) as job:
            for number in job.pending(range(count), identity):
                job.put(identity(number), str(number), np.full(size, number, np.uint8))
        assert job.counts == Counts(inputs=count, ok=count)
        # One shard is filled, one waits and one is written; as much again for gaps in the heap.
        assert status("VmHWM:") - before < 2 * 3 * shard_rows * size < count * size / 8
        assert read_index(tmp_path).num_rows == count

    assert ended(start(child)) == 0
