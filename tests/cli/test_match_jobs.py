"""`dsd-fast match` by several workers, and killed at random points: the same results as of one run."""

import json
import os
import random
import signal
import sys
from collections import Counter
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from dsd_fast.cli.match.results import write_results
from dsd_fast.cli.options import ModelOptions
from dsd_fast.cli.results import stream_json, write_json
from dsd_fast.jobs import read_index
from tests.cli.test_features import command_line
from tests.cli.test_features_killed import watched
from tests.jobs.numbers import ended, files, start

KILLS = 4
CAPTIONS = ["a red ring", "a blue cross", "a green disc"]
COMMAND = ["match", "in", *(part for each in CAPTIONS for part in ("--caption", each)), "--shard-rows", "2"]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Seven pictures and a file that is none, of which two are equal; and scores that cost nothing."""
    draw = np.random.default_rng(0)
    (tmp_path / "in/deep").mkdir(parents=True)
    for number in range(7):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in/bad.png").write_bytes(b"no picture")
    (tmp_path / "again").mkdir()
    os.link(tmp_path / "in/3.png", tmp_path / "again/3.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    model = dsd.load("mini")
    monkeypatch.setattr(ModelOptions, "load", lambda _: model)
    monkeypatch.setattr(dsd.Matcher, "_scores", of_pixels)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def of_pixels(self, images, texts, together):
    for number, image in enumerate(images):
        try:
            pixels = torch.from_numpy(np.array(dsd.images.load_image(image))).float()
        except dsd.images.ImageError as error:
            yield number, error
        else:
            yield number, pixels.mean((0, 1))


def results_of(folder):
    """The content of results.json but for the times, and the rows of scores.parquet."""
    content = json.loads((Path(folder) / "results.json").read_text())
    del content["seconds"], content["heatmap_seconds"]
    return content, pq.read_table(Path(folder) / "scores.parquet").to_pylist()


def test_the_last_of_several_workers_writes_the_results_of_all(cli, pictures):
    command = [*COMMAND, "again/3.png"]
    one = cli(*command, "--out", "one")
    assert one.exit_code == 1
    assert "9 images: 8 scored, 1 error, 1 duplicate. 21 pairs in" in one.stdout
    first = cli(*command, "--out", "two", "--worker", 0, "--workers", 2)
    made = len(read_index("two"))
    assert 0 < made < 8
    assert " of other workers still to be scored. " in first.stdout
    assert not Path("two/results.json").exists()
    last = cli(*command, "--out", "two", "--worker", 1, "--workers", 2)
    assert last.exit_code == 1
    assert results_of("two") == results_of("one")
    # Each row's scores stand where its image does.
    content, rows = results_of("two")
    assert [entry["path"] for entry in content["images"]] == [
        *(f"in/{n}.png" for n in range(7)),
        "in/bad.png",
        "again/3.png",
    ]
    for index, path in [*enumerate(f"in/{number}.png" for number in range(7)), (8, "again/3.png")]:
        own = [row["score"] for row in rows if row["image_index"] == index]
        assert own == pytest.approx(np.array(Image.open(path)).mean((0, 1)).tolist(), rel=1e-5)
    again = cli(*command, "--out", "two", "--worker", 0, "--workers", 2)
    assert again.exit_code == 1
    assert "9 images: 8 scored, " in again.stdout
    assert results_of("two") == results_of("one")
    refused = cli(*command, "--out", "two", "--worker", 2, "--workers", 2)
    assert refused.exit_code == 2
    assert "--worker: got 2, expected below --workers, 2" in refused.stderr


def in_turn(make, *, partitions, workers, gpus_per_worker, address, progress=None):
    """In place of Ray: what travels, travels, and the partitions run one after the other."""
    task = ForkingPickler.loads(ForkingPickler.dumps(make))()
    return [json.loads(json.dumps(task(each, partitions, progress or list))) for each in range(partitions)]


def test_partitions_make_the_results_of_one_process(cli, pictures, monkeypatch):
    command = [*COMMAND, "again/3.png", "--report", "--out"]
    assert cli(*command, "one").exit_code == 1
    monkeypatch.setattr("dsd_fast.jobs.ray.run_on_ray", in_turn)
    done = cli(*command, "many", "--engine", "ray", "--workers", 2, "--partitions", 3)
    assert done.exit_code == 1, done.stderr
    # Of the two equal files one partition sees both.
    assert "9 images: 8 scored, 1 error, 1 duplicate. 21 pairs in" in done.stdout
    assert results_of("many") == results_of("one")
    assert Path("many/report.html").exists()
    assert sorted({shard.split("-")[1] for shard in read_index("many")["shard"].to_pylist()}) == [
        "0of3",
        "1of3",
        "2of3",
    ]


def run(out, prepare=lambda: None):
    """The command in a process of its own, after ``prepare()``; minus its exit code, or the signal that ended it."""

    def child():
        prepare()
        with open("told", "w") as sys.stdout:
            sys.stderr = sys.stdout
            command_line([*COMMAND, "--out", out])

    return ended(start(child))


def test_killed_at_random_points_and_the_identical_set(pictures):
    # One picture is none.
    assert run("whole") == -1, Path("told").read_text()
    whole, results = files(Path("whole")), results_of("whole")
    assert run("counted", partial(watched, last=write_results)) == -1
    calls = int(Path("calls").read_text())
    draw, kills, found = random.Random(0), 0, Counter()
    while kills < KILLS:
        # In each of as many parts of the run.
        out = Path(f"killed-{kills}")
        how = run(out, partial(watched, int(calls * (kills + draw.random()) / KILLS), write_results))
        assert how in (-1, signal.SIGKILL)
        kills += how == signal.SIGKILL
        found["results" if len(read_index(out)) == 8 else "job"] += 1
        # Results are those of all rows or not there.
        assert not (out / "results.json").exists() or results_of(out) == results
        assert run(out) == -1
        assert results_of(out) == results
        assert files(out).keys() == whole.keys()
        assert all(content == whole[name] for name, content in files(out).items() if name != "results.json")
    assert found.keys() == {"job", "results"}


def test_json_in_parts_is_json_as_a_whole(tmp_path):
    items = [{"path": "caf\\udce9\n", "ranked": [{"score": 1.5}]}, {"path": "b", "ranked": []}]
    head, tail = {"counts": {"images": 2}, "captions": ["é"]}, {"complete": True, "seconds": 0.5}
    for some in (items, []):
        with open(tmp_path / "parts", "wb") as parts, open(tmp_path / "whole", "wb") as whole:
            assert stream_json(parts, head, "images", iter(some), lambda: tail) == tail
            write_json(whole, {**head, "images": some, **tail})
        assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
