"""A job's rows, counts and files; what kills it is in test_killed."""

import hashlib
import json
import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsd_fast.jobs import Counts, Job, ManifestError, all_ended, read_index, row_id, worker_of
from tests.jobs.numbers import BAD, COUNT, NUMBERS, SETTINGS, check_readable, ended, files, identity, run, start

FIRST = Counts(inputs=25, ok=21, errors=2, duplicates=2)


def digest(numbers):
    """Of the ids, each behind its length, as the names of shards have it."""
    content = b"".join((32).to_bytes(8, "little") + identity(number).encode() for number in numbers)
    return hashlib.blake2b(content, digest_size=16).hexdigest()[:16]


def test_shards_hold_the_rows_in_their_order(tmp_path):
    folder = tmp_path / "new" / "out"
    assert run(folder) == FIRST
    groups = [range(5), range(5, 10), range(10, 15), range(15, 20), range(20, 23)]
    names = [f"{shard:06d}-0of1-{digest(numbers)}" for shard, numbers in enumerate(groups)]
    assert set(files(folder)) == {
        "manifest.json",
        *(f"shards/{name}.npy" for name in names),
        *(f"index/{name}.parquet" for name in names),
    }
    table = read_index(folder)
    assert table.schema == pa.schema(
        [(name, pa.string()) for name in ("id", "name", "status", "reason", "message", "shard")]
        + [("row", pa.int32()), ("number", pa.int64())]
    )
    expected = [
        {
            "id": identity(number),
            "name": f"n{number}",
            "status": "error" if number in BAD else "ok",
            "reason": "unlucky" if number in BAD else "",
            "message": f"{number} is unlucky" if number in BAD else "",
            "shard": names[number // 5],
            "row": None if number in BAD else sum(other not in BAD for other in range(number // 5 * 5, number)),
            "number": number,
        }
        for number in range(COUNT)
    ]
    assert table.to_pylist() == expected
    for name, numbers in zip(names, groups, strict=True):
        array = np.load(folder / f"shards/{name}.npy", allow_pickle=False)
        assert array.tolist() == [[n * i for i in range(6)] for n in numbers if n not in BAD]
    # As any reader of Parquet sees it.
    assert pq.read_table(folder / "index").to_pylist() == expected


def test_a_second_run_makes_nothing_and_counts_what_is_there(tmp_path):
    run(tmp_path)
    before = files(tmp_path)
    timeline = (tmp_path / "timeline.json").read_bytes()
    counts = run(tmp_path, each=lambda number: pytest.fail("made again"))
    assert counts == Counts(inputs=25, duplicates=2, done=23, done_errors=2)
    assert files(tmp_path) == before
    assert (tmp_path / "timeline.json").read_bytes() == timeline


def test_more_inputs_are_added(tmp_path):
    run(tmp_path, range(8))
    before = files(tmp_path)
    assert run(tmp_path) == Counts(inputs=25, ok=14, errors=1, duplicates=2, done=8, done_errors=1)
    assert before.items() < files(tmp_path).items()
    assert [row["number"] for row in check_readable(tmp_path)] == list(range(COUNT))


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_together_make_what_one_makes(tmp_path, workers):
    run(tmp_path / "one")
    counts = [run(tmp_path / "all", worker=worker, workers=workers) for worker in range(workers)]
    one, together = (
        {row["id"]: (row["name"], row["status"], row["reason"], row["message"], row["number"]) for row in rows}
        for rows in (check_readable(tmp_path / "one"), check_readable(tmp_path / "all"))
    )
    assert one == together
    for name in ("inputs", "ok", "errors", "duplicates"):
        assert sum(getattr(each, name) for each in counts) == getattr(FIRST, name)
    for worker, each in enumerate(counts):
        mine = [number for number in NUMBERS if worker_of(identity(number), workers) == worker]
        assert (each.inputs, each.elsewhere, each.not_reached) == (len(mine), len(NUMBERS) - len(mine), 0)
    # And one goes on where several have stopped.
    assert run(tmp_path / "all").done == COUNT


def test_workers_at_once_share_a_folder(tmp_path):
    workers = [start(lambda worker=worker: run(tmp_path, worker=worker, workers=4)) for worker in range(4)]
    assert [ended(worker) for worker in workers] == [0] * 4
    assert {row["number"] for row in check_readable(tmp_path)} == set(range(COUNT))


@pytest.fixture
def indices_read(monkeypatch):
    """The shards whose index is read, in a list that may be emptied."""
    read, original = [], pq.ParquetFile

    def noted(file, *arguments, **options):
        read.append(file.stem)
        return original(file, *arguments, **options)

    monkeypatch.setattr(pq, "ParquetFile", noted)
    return read


def test_a_worker_reads_the_index_of_its_own_part_where_the_folder_has_no_other_parts(tmp_path, indices_read):
    for worker in range(4):
        run(tmp_path, range(15), worker=worker, workers=4, shard_rows=1)
        assert indices_read == []
    shards = sorted(file.stem for file in (tmp_path / "index").iterdir())
    for worker in range(4):
        own = [shard for shard in shards if f"-{worker}of4-" in shard]
        assert 0 < len(own) < len(shards)
        counts = run(tmp_path, range(15), worker=worker, workers=4, each=lambda number: pytest.fail("made again"))
        assert (counts.done, counts.not_reached) == (counts.inputs, 0)
        assert indices_read == own
        indices_read.clear()
    # Of other parts, one row may stand in any shard.
    assert run(tmp_path, worker=1, workers=2, shard_rows=1).not_reached == 0
    assert indices_read == shards
    assert run(tmp_path, worker=0, workers=2, shard_rows=1).not_reached == 0
    indices_read.clear()
    shards = {file.stem for file in (tmp_path / "index").iterdir()}
    for worker in range(4):
        run(tmp_path, worker=worker, workers=4, each=lambda number: pytest.fail("made again"))
        assert set(indices_read) == shards
        indices_read.clear()


def test_memory_is_that_of_a_workers_own_ids(tmp_path):
    """At most 256 bytes a row, as docs/clusters.md says; of so many rows tables of hashes are as empty as they get."""
    ids = [row_id(str(number)) for number in range(87_500)]
    with Job(tmp_path, "ids", {}, shard_rows=4096) as job:
        for each in job.pending(ids, str):
            job.put(each, "")
    tracemalloc.start()
    try:
        with Job(tmp_path, "ids", {}) as job:
            assert list(job.pending(ids, str)) == []
        assert tracemalloc.get_traced_memory()[1] < 256 * len(ids)
    finally:
        tracemalloc.stop()
    assert job.counts.done == len(ids)


def test_errors_are_tried_again_only_when_asked(tmp_path):
    run(tmp_path)
    # One of the two is good by now.
    assert run(tmp_path, bad={7}, retry_errors=True) == Counts(inputs=25, ok=1, errors=1, duplicates=2, done=21)
    rows = {row["number"]: row for row in read_index(tmp_path).to_pylist()}
    assert len(rows) == len(read_index(tmp_path)) == COUNT
    assert (rows[15]["status"], rows[7]["status"]) == ("ok", "error")
    # The error that was made last counts.
    assert rows[7]["shard"] == rows[15]["shard"] == max(row["shard"] for row in rows.values())
    assert run(tmp_path) == Counts(inputs=25, duplicates=2, done=23, done_errors=1)
    assert run(tmp_path, bad=(), retry_errors=True) == Counts(inputs=25, ok=1, duplicates=2, done=22)
    assert read_index(tmp_path, ["number"])["status"].to_pylist() == ["ok"] * COUNT


def test_a_result_counts_before_an_error_whenever_it_was_made(tmp_path):
    run(tmp_path, [3])
    (shard,) = (tmp_path / "index").iterdir()
    later = shard.with_name(shard.name.replace("000000", "000001"))
    table = pq.read_table(shard)
    changed = {**table.to_pylist()[0], "status": "error", "row": None}
    pq.write_table(pa.Table.from_pylist([changed], schema=table.schema), later)
    assert read_index(tmp_path)["status"].to_pylist() == ["ok"]


def test_other_settings_are_refused_and_nothing_changes(tmp_path, monkeypatch):
    run(tmp_path)
    before = files(tmp_path)
    monkeypatch.setitem(SETTINGS, "width", 7)
    with pytest.raises(ManifestError, match="width 6 there, 7 now"):
        run(tmp_path)
    assert files(tmp_path) == before


def shorten(file):
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("damage", [os.unlink, shorten])
@pytest.mark.parametrize("kind", ["shards", "index"])
def test_what_is_missing_or_short_is_made_again(tmp_path, damage, kind):
    run(tmp_path)
    before = {row["number"]: row for row in check_readable(tmp_path)}
    file = sorted((tmp_path / kind).iterdir())[1]
    damage(file)
    assert {row["number"] for row in check_readable(tmp_path)} == set(range(COUNT)) - set(range(5, 10))
    assert run(tmp_path) == Counts(inputs=25, ok=4, errors=1, duplicates=2, done=18, done_errors=1)
    after = {row["number"]: row for row in check_readable(tmp_path)}
    assert {number: row["name"] for number, row in after.items()} == {n: row["name"] for n, row in before.items()}


def test_what_else_lies_in_the_folder_is_left_alone(tmp_path):
    for name in ("shards/mine.npy", "index/mine.parquet", ".work-0of1.txt", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    run(tmp_path)
    assert len(check_readable(tmp_path)) == COUNT
    kept = {name for name, content in files(tmp_path).items() if content == b"mine"}
    assert kept == {"shards/mine.npy", "index/mine.parquet", ".work-0of1.txt", "notes.txt"}


def test_an_exception_leaves_whole_shards_and_the_next_run_gives_the_same(tmp_path):
    run(tmp_path / "whole")

    def stop(number):
        if number == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", each=stop)
    assert [row["number"] for row in check_readable(tmp_path / "stopped")] == list(range(10))
    run(tmp_path / "stopped")
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_what_was_not_reached_is_counted(tmp_path):
    with Job(tmp_path, "multiples", SETTINGS) as job:
        for number in job.pending(range(10), identity):
            if number == 6:
                break
            job.put(identity(number), str(number))
    assert job.counts == Counts(inputs=7, ok=6)
    assert job.counts.not_reached == 1
    assert read_index(tmp_path)["name"].to_pylist() == [str(number) for number in range(6)]


def test_an_id_is_answered_once_and_only_when_it_is_pending(tmp_path):
    with Job(tmp_path, "multiples", SETTINGS, columns={"number": "int64"}) as job:
        for number in job.pending([1], identity):
            with pytest.raises(ValueError, match="expected one that pending has given"):
                job.put(identity(2), "2")
            with pytest.raises(ValueError, match="columns: got colour, expected number"):
                job.put(identity(number), "1", colour="red")
            with pytest.raises(ValueError, match="reason is empty"):
                job.fail(identity(number), "1", "", "")
            job.put(identity(number), "1", number=1)
            with pytest.raises(ValueError, match="has no row yet"):
                job.fail(identity(number), "1", "late", "too late")
        with pytest.raises(ValueError, match="row is 'one', expected 32 hexadecimal digits"):
            next(job.pending(["one"], str))
    assert job.counts == Counts(inputs=1, ok=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_rows": 0}, "shard_rows is 0, expected at least 1"),
        ({"workers": 0}, "workers is 0, expected at least 1"),
        ({"worker": 2, "workers": 2}, "worker is 2, expected 0 to 1, one of 2 workers"),
        ({"worker": -1}, "worker is -1, expected 0 to 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Job(tmp_path, "multiples", SETTINGS, **options)


def test_names_that_are_no_text_are_kept_as_escapes(tmp_path):
    name = os.fsdecode(b"\xff.png")
    with Job(tmp_path, "multiples", SETTINGS) as job:
        for row in job.pending([row_id(name)], str):
            job.fail(row, name, "corrupt", f"{name} is damaged")
    (row,) = read_index(tmp_path).to_pylist()
    assert (row["name"], row["message"]) == ("\\udcff.png", "\\udcff.png is damaged")


@pytest.mark.parametrize("name", ["../outside.npy", "/tmp/outside.npy", "a/../../outside.npy"])
def test_a_shards_files_stay_in_the_folder(tmp_path, name):
    def write(files, rows):
        with files.open(name) as file:
            file.write(b"x")

    with pytest.raises(ValueError, match="expected a path inside the job's folder"):
        run(tmp_path / "out", write=write)
    assert not (tmp_path / "outside.npy").exists()


def test_an_empty_folder_has_an_empty_index(tmp_path):
    assert read_index(tmp_path).num_rows == read_index(tmp_path / "none", ["row"]).num_rows == 0
    assert read_index(tmp_path).column_names == ["id", "name", "status", "reason", "message", "shard", "row"]
    assert read_index(tmp_path, ["row"]).column_names == ["id", "row", "status", "shard"]
    assert run(tmp_path, []) == Counts()
    assert read_index(tmp_path).num_rows == 0


def test_the_timeline_tells_writing_from_computing(tmp_path):
    run(tmp_path)
    content = json.loads((tmp_path / "timeline.json").read_text())
    assert content["unit"] == "seconds"
    assert {span["name"] for span in content["spans"]} == {"compute", "write"}
    assert all(0 <= span["start"] <= span["end"] for span in content["spans"])
    run(tmp_path / "shared", worker=1, workers=2)
    assert (tmp_path / "shared" / "timeline-1of2.json").exists()


def test_the_last_of_several_workers_knows_it(tmp_path):
    def fail(number):
        raise KeyError

    seen = []
    for worker in (2, 0, 1):
        run(tmp_path, worker=worker, workers=3)
        seen.append(all_ended(tmp_path, 3))
    assert seen == [False, False, True]
    assert not all_ended(tmp_path, 2)
    # One that has begun again and has not ended well is at work, or dead.
    with pytest.raises(KeyError):
        run(tmp_path, [*NUMBERS, *range(100, 200)], worker=0, workers=3, each=fail)
    assert not all_ended(tmp_path, 3)
    # One that was given more than it has made has not ended, though its block has.
    with Job(tmp_path, "multiples", SETTINGS, columns={"number": "int64"}, worker=0, workers=3) as job:
        next(job.pending([*NUMBERS, *range(200, 300)], key=identity))
    assert not all_ended(tmp_path, 3)
    run(tmp_path, worker=0, workers=3)
    assert all_ended(tmp_path, 3)
    run(tmp_path / "alone")
    assert all_ended(tmp_path / "alone", 1)
