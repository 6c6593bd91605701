"""The index of a folder, whole and shard by shard."""

import os
import random
from itertools import groupby

import pyarrow as pa
import pytest

from dsd_fast.jobs import Row, ShardFiles, index_shards, read_index, row_id


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write(folder, number, rows, worker=0):
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    ShardFiles(folder, number, worker, 2, rows).finish(rows, {"number": "int64"})


def test_rows_that_were_made_anew_against_a_plain_loop(tmp_path):
    drawn, best, names = random.Random(0), {}, [row_id(str(number)) for number in range(60)]
    for number in range(30):
        made = [
            Row(name, name[:4], None, {"number": number}, drawn.choice(["", "again"]))
            for name in drawn.sample(names, drawn.choice([1, 4, 9]))
        ]
        write(tmp_path, number, made)
        for row in made:
            # The later one, but a result before an error.
            if row.id not in best or row.status == "ok" or best[row.id][0].reason:
                best[row.id] = row, number
    kept = sorted(((number, row.id, row.status) for row, number in best.values()))
    found = [(row["number"], row["id"], row["status"]) for row in read_index(tmp_path).to_pylist()]
    assert sorted(found) == kept
    parts = [table["number"].to_pylist() for table in index_shards(tmp_path)]
    assert [(part[0], len(part)) for part in parts] == [
        (number, len(list(each))) for number, each in groupby(number for number, _, _ in kept)
    ]
    assert all(len(set(part)) == 1 for part in parts)


def test_ids_that_are_equal_in_half_are_two_rows(tmp_path):
    one, two = "ab" * 16, "ab" * 8 + "cd" * 8
    write(tmp_path, 0, [Row(one, "one", columns={"number": 1}, reason="again"), Row(two, "two", columns={"number": 2})])
    write(tmp_path, 1, [Row(one, "one", columns={"number": 3})])
    assert [(row["id"], row["number"]) for row in read_index(tmp_path).to_pylist()] == [(two, 2), (one, 3)]


def test_shard_by_shard_one_shard_is_in_memory(tmp_path):
    for number in range(20):
        rows = [Row(row_id(str((number, each))), "x" * 1000) for each in range(200)]
        write(tmp_path, number, rows)
    whole, before, most = read_index(tmp_path).nbytes, pa.total_allocated_bytes(), 0
    for table in index_shards(tmp_path):
        assert len(table) == 200
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < whole / 5
