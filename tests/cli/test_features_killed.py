"""`dsd-fast features` killed at random points, as by `kill -9`, and started again: the identical set."""

import os
import random
import signal
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dsd_fast as dsd
from dsd_fast.cli.options import ModelOptions
from dsd_fast.jobs import Job, read_index
from tests.cli.test_features import command_line, features_of
from tests.jobs.numbers import ended, files, start

KILLS = 20
LAYERS = "down-level0-repeat0-res-out,down-level0-downsampler-out"
COMMAND = ["features", "in", "--layers", LAYERS, "--timesteps", "50,200", "--shard-rows", 3, "--out"]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Ten pictures and a file that is none; and processes that start with all imported and the model in memory."""
    draw = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(10):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    model = dsd.load("mini")
    monkeypatch.setattr(ModelOptions, "load", lambda _: model)
    # A kill, unlike a power failure, takes nothing back that was written.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def run(out, prepare=lambda: None):
    """The command in a process of its own, after ``prepare()``; minus its exit code, or the signal that ended it."""

    def child():
        prepare()
        with open("told", "w") as sys.stdout:
            sys.stderr = sys.stdout
            command_line([*COMMAND, out])

    return ended(start(child))


def watched(moment=None, last=Job.__exit__):
    """Kills this process before a call of a function, Python's or C's, in whatever thread.

    Args:
        moment: which call, from 0 at the job's start; None: none, and the file "calls" says at the end how many.
        last: the function whose return is the end.
    """
    count, inside = 0, False

    def called(frame, event, argument):
        nonlocal count, inside
        if event == "call" and frame.f_code is Job.__enter__.__code__:
            inside = True
        elif inside and event == "return" and frame.f_code is last.__code__:
            inside = False
            Path("calls").write_text(str(count))
        if inside and event in ("call", "c_call"):
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    threading.setprofile(called)
    sys.setprofile(called)


def progress_of(folder):
    """How far a killed run had come."""
    if not (folder / "manifest.json").exists():
        return "no manifest"
    data, indexes = (len(list(folder.rglob(f"*{ending}"))) for ending in (".safetensors", ".parquet"))
    if list(folder.rglob("*.tmp")):
        return "inside a file"
    return "between data and marker" if data > indexes else f"{indexes} shards"


def test_killed_at_twenty_random_points_and_the_identical_set(pictures):
    # One picture is none.
    assert run("whole") == -1, Path("told").read_text()
    whole = files(Path("whole"))
    assert len(features_of("whole")) == 10, Path("told").read_text()
    # Some more or fewer from run to run, as threads take turns.
    assert run("counted", watched) == -1
    calls = int(Path("calls").read_text())
    draw, kills, found = random.Random(0), 0, Counter()
    while kills < KILLS:
        moment, out = draw.randrange(calls), Path(f"killed-{kills}")
        how = run(out, partial(watched, moment))
        assert how in (-1, signal.SIGKILL)
        kills += how == signal.SIGKILL
        found[progress_of(out)] += 1
        # Shards are whole or not there.
        assert read_index(out).num_rows in (0, 3, 6, 9, 11)
        assert run(out) == -1
        assert files(out) == whole
    # From before the first shard to after the last.
    assert len(found) >= 4, found
