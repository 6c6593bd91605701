"""What a folder is given at its end."""

import errno
import json
import os
import shutil
import signal
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest

from dsd_fast.generation import closing
from dsd_fast.generation.closing import close
from dsd_fast.generation.files import LAYOUTS
from dsd_fast.generation.near_duplicates import near_duplicates
from dsd_fast.jobs import JobError, read_index
from tests.generation.pictures import BAD, COUNT, identity, rows, run, vector
from tests.jobs.numbers import ended, files, start
from tests.jobs.test_killed import count_calls, kill

GOOD = [number for number in range(COUNT) if number not in BAD]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts(tmp_path, layout):
    run(tmp_path, layout)
    told = close(tmp_path)
    labels = [row.label or "" for row in rows()]
    expected = [
        {
            "cls": cls,
            "label": labels[cls],
            "images": sum(labels[number] == labels[cls] for number in GOOD),
            "errors": sum(labels[number] == labels[cls] for number in BAD),
        }
        for cls in range(3)
    ]
    names = [] if layout == "folder" else [f"{number:05d}{LAYOUTS[layout]}" for number in range(4)]
    assert told == {
        "rows": COUNT,
        "images": len(GOOD),
        "errors": {"not-accepted": 2},
        "rejected": {"near-duplicate": 2, "rejected": 2},
        "classes": expected,
        "near_duplicates": 2,
        "shards": names,
    }
    assert close(tmp_path) == told


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_shards_have_numbers_tables_and_statistics(tmp_path, layout):
    run(tmp_path, layout)
    close(tmp_path)
    names = (tmp_path / "shards.txt").read_text().splitlines()
    index = read_index(tmp_path).drop_columns(["clip"])
    shards = list(dict.fromkeys(index["shard"].to_pylist()))
    assert len(names) == len(shards) == 4
    for number, shard in enumerate(shards):
        link = tmp_path / names[number]
        assert link.samefile(tmp_path / "shards" / f"{shard}{LAYOUTS[layout]}")
        here = [row for row in index.to_pylist() if row["shard"] == shard]
        if layout == "webdataset":
            assert pq.read_table(tmp_path / f"{number:05d}.parquet").to_pylist() == here
        errors = sum(row["status"] == "error" for row in here)
        statistics = json.loads((tmp_path / f"{number:05d}_stats.json").read_text())
        assert statistics == {
            "shard": shard,
            "count": len(here),
            "successes": len(here) - errors,
            "failed": errors,
            "status_dict": {"success": len(here) - errors} | ({"not-accepted": errors} if errors else {}),
            "rejected": {"near-duplicate": errors, "rejected": errors} if errors else {},
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_closing_changes_no_file(tmp_path, layout):
    run(tmp_path, layout)
    close(tmp_path)
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in tmp_path.iterdir() if file.is_file()}
    close(tmp_path)
    assert before == {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in before}
    assert not (tmp_path / ".work-close").exists()


@pytest.mark.parametrize("layout", ["webdataset", "folder"])
def test_killed_at_every_change_of_the_folder(tmp_path, layout):
    # The folder was closed before, when another worker's shards were not there: numbers move.
    def prepared(folder):
        run(folder, layout, numbers=range(7), worker=1, workers=2, shard_rows=2)
        close(folder)
        run(folder, layout, numbers=range(7), worker=0, workers=2, shard_rows=2)
        return folder

    origin = prepared(tmp_path / "origin")
    shutil.copytree(origin, tmp_path / "whole")
    close(tmp_path / "whole")
    whole, moment, how = files(tmp_path / "whole"), 0, signal.SIGKILL

    def child():
        import tests.jobs.test_killed as killed

        killed.CALLS = ("replace", "mkdir", "rmdir", "link", "unlink")
        count_calls(lambda number: kill() if number == moment else None)
        close(folder)

    while how:
        folder = tmp_path / str(moment)
        shutil.copytree(origin, folder)
        how = ended(start(child))
        assert how in (0, signal.SIGKILL)
        close(folder)
        assert files(folder) == whole, f"killed before change {moment}"
        shutil.rmtree(folder)
        moment += 1
    assert moment > {"webdataset": 20, "folder": 4}[layout]


def test_several_workers_at_once_leave_what_one_closing_leaves(tmp_path):
    for worker in range(3):
        run(tmp_path / "one", worker=worker, workers=3, shard_rows=2)
    close(tmp_path / "one")

    def child(worker):
        run(tmp_path / "many", worker=worker, workers=3, shard_rows=2)
        close(tmp_path / "many")

    (tmp_path / "many").mkdir()
    children = [start(lambda worker=worker: child(worker)) for worker in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_one_closing_waits_for_the_other(tmp_path, monkeypatch):
    run(tmp_path)
    inside, most, lock, original = 0, 0, threading.Lock(), closing._Closing.run

    def counted(self):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        told = original(self)
        with lock:
            inside -= 1
        return told

    monkeypatch.setattr(closing._Closing, "run", counted)
    threads = [threading.Thread(target=close, args=(tmp_path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_what_is_no_longer_right_goes(tmp_path):
    run(tmp_path)
    for name in ("00004.tar", "00017.tar", "00017.parquet", "00017_stats.json", "123456_stats.json"):
        (tmp_path / name).write_text("of an earlier closing")
    for name in ("notes.tar", "00017.txt", "7.tar"):
        (tmp_path / name).write_text("of somebody")
    (tmp_path / ".work-close").mkdir()
    (tmp_path / ".work-close" / "file.tmp").write_text("of a killed closing")
    close(tmp_path)
    assert {file.name for file in tmp_path.iterdir() if file.suffix == ".tar"} == {
        *(f"{number:05d}.tar" for number in range(4)), "notes.tar", "7.tar",
    }  # fmt: skip
    assert not list(tmp_path.glob("*17_stats.json")) + list(tmp_path.glob("00017.parquet")) + list(tmp_path.glob("1*"))
    assert (tmp_path / "00017.txt").exists()
    assert not (tmp_path / ".work-close").exists()


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_without_hard_links_the_shards_themselves_are_named(tmp_path, monkeypatch, code):
    run(tmp_path)
    linked = close(tmp_path)

    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    for name in linked["shards"]:
        (tmp_path / name).unlink()
    told = close(tmp_path)
    shards = dict.fromkeys(read_index(tmp_path)["shard"].to_pylist())
    assert told == {**linked, "shards": [f"shards/{shard}.tar" for shard in shards]}
    assert (tmp_path / "shards.txt").read_text().split() == told["shards"]
    assert 'path: "shards/*.tar"' in (tmp_path / "dataset_card.md").read_text()
    assert len(list(tmp_path.glob("*_stats.json"))) == 4
    assert not list(tmp_path.glob("*.tar"))


def test_a_disk_that_refuses_is_said_in_one_sentence(tmp_path, monkeypatch):
    folder = tmp_path / "refused"
    run(folder)

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(JobError, match=r"cannot be closed: No space left on device; its images are safe"):
            close(folder)
    close(folder)
    run(tmp_path / "whole")
    close(tmp_path / "whole")
    assert files(folder) == files(tmp_path / "whole")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_errors(tmp_path, layout):
    run(tmp_path, layout, numbers=sorted(BAD))
    told = close(tmp_path)
    assert (told["rows"], told["images"], told["shards"], told["near_duplicates"]) == (2, 0, [], None)
    assert told["errors"] == {"not-accepted": 2}
    assert "configs:" not in (tmp_path / "dataset_card.md").read_text()
    if layout != "folder":
        assert (tmp_path / "shards.txt").read_text() == ""
    assert not (tmp_path / "near_duplicates.parquet").exists()


def test_a_shard_of_errors_alone_has_no_number(tmp_path):
    run(tmp_path, shard_rows=1)
    told = close(tmp_path)
    assert told["shards"] == [f"{number:05d}.tar" for number in range(len(GOOD))]
    assert (told["rows"], told["near_duplicates"]) == (COUNT, 2)


def test_no_rows_at_all(tmp_path):
    run(tmp_path, numbers=[])
    assert close(tmp_path)["rows"] == 0


def test_errors_that_were_made_good_count_as_images(tmp_path):
    run(tmp_path)
    close(tmp_path)
    run(tmp_path, bad=(), retry_errors=True)
    told = close(tmp_path)
    assert (told["rows"], told["images"], told["errors"], told["rejected"]) == (COUNT, COUNT, {}, {})
    counts = [json.loads(file.read_text())["count"] for file in sorted(tmp_path.glob("*_stats.json"))]
    assert sum(counts) == COUNT
    tables = [pq.read_table(file) for file in sorted(tmp_path.glob("0*.parquet"))]
    assert sorted(row for table in tables for row in table["id"].to_pylist()) == sorted(map(identity, range(COUNT)))


def test_near_duplicates_are_marked_within_their_class(tmp_path):
    run(tmp_path, bad=())
    assert close(tmp_path)["near_duplicates"] == 3
    marks = pq.read_table(tmp_path / "near_duplicates.parquet").to_pylist()
    # 8, 9 and 10 look like 0, 1 and 2, and are of their classes.
    pairs = [sorted((identity(number), identity(number + 8))) for number in range(3)]
    assert sorted((mark["near"], mark["id"]) for mark in marks) == sorted(map(tuple, pairs))
    values = [np.frombuffer(vector(number), np.float16).astype(np.float64) for number in (0, 8)]
    cosine = values[0] @ values[1] / np.linalg.norm(values[0]) / np.linalg.norm(values[1])
    np.testing.assert_allclose([mark["cosine"] for mark in marks], cosine, rtol=1e-6)


def test_near_duplicates_are_not_sought_again_for_the_same_images(tmp_path, monkeypatch):
    run(tmp_path)
    close(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(closing, "near_duplicates", None)
        assert close(tmp_path)["near_duplicates"] == 2
    (tmp_path / "near_duplicates.parquet").write_bytes(b"copied in part")
    assert close(tmp_path)["near_duplicates"] == 2
    run(tmp_path, bad=(), retry_errors=True)
    assert close(tmp_path)["near_duplicates"] == 3


@pytest.mark.parametrize("block", [1, 3, 7, 64])
def test_near_duplicates_against_a_plain_loop(monkeypatch, block):
    monkeypatch.setattr("dsd_fast.generation.near_duplicates._BLOCK", block)
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(40, 3)).astype(np.float16)
    vectors[7] = 0
    vectors[9, 1] = np.nan
    vectors[11, 1] = np.inf
    classes = generator.integers(0, 3, 40)
    ids = np.array([f"{number:032x}" for number in generator.permutation(40)], "S32")
    found = near_duplicates(ids, vectors, classes, 0.9)
    units = vectors.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        units /= np.linalg.norm(units, axis=1, keepdims=True)
    expected = []
    for one in np.argsort(ids):
        earlier = [
            (units[one] @ units[other], ids[other].decode())
            for other in range(40)
            if ids[other] < ids[one] and classes[other] == classes[one] and units[one] @ units[other] >= 0.9
        ]
        if earlier:
            cosine, near = max(earlier)
            expected.append((ids[one].decode(), near, cosine))
    assert len(expected) > 5
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    np.testing.assert_allclose([each[2] for each in found], [each[2] for each in expected], rtol=1e-6)
    # Without those that are marked no two near ones are left.
    left = [number for number in range(40) if ids[number].decode() not in {each[0] for each in found}]
    assert near_duplicates(ids[left], vectors[left], classes[left], 0.9) == []
