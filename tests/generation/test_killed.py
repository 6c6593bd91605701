"""A generation killed at random points, its closing step included, and started again: the identical set."""

import os
import random
import signal
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

import dsd_fast as dsd
from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler
from dsd_fast.generation.export import close, generate_to
from dsd_fast.jobs import Job, read_index
from tests.jobs.numbers import ended, files, start
from tests.tiny import tiny_pipeline

KILLS = 20
ROWS = [GenerateRow("a red cat", seed) for seed in range(7)] + [GenerateRow("red " * 100, 7)]


@pytest.fixture
def sampler(monkeypatch):
    # A kill, unlike a power failure, takes nothing back that was written.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    sampler = Sampler(dsd.from_pipeline(tiny_pipeline("sd15")), GenerateConfig(steps=1, guidance=1.0))
    # Weights are hashed once for all processes.
    settings = sampler.settings()
    monkeypatch.setattr(Sampler, "settings", lambda _: settings)
    return sampler


def run(sampler, out, prepare=lambda: None):
    """The job in a process of its own, after ``prepare()``; 0, or the signal that ended it."""

    def child():
        prepare()
        generate_to(sampler, ROWS, out, shard_rows=3, batch=2)

    return ended(start(child))


def watched(moment=None):
    """Kills this process before a call of a function, Python's or C's, in whatever thread.

    Args:
        moment: which call, from 0 at the job's start; None: none, and the file "calls" says how many there were before
            the closing step, and to its end.
    """
    count, inside, before = 0, False, 0

    def called(frame, event, argument):
        nonlocal count, inside, before
        if event == "call" and frame.f_code is Job.__enter__.__code__:
            inside = True
        elif event == "call" and frame.f_code is close.__code__:
            before = count
        elif inside and event == "return" and frame.f_code is close.__code__:
            inside = False
            Path("calls").write_text(f"{before} {count}")
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
    shards, indexes = (len(list((folder / part).glob("*-*"))) for part in ("shards", "index"))
    if indexes < 3:
        return "between data and marker" if shards > indexes else f"{indexes} shards"
    return "closed" if (folder / "shards.txt").exists() else "closing" if (folder / "00000.tar").exists() else "made"


def test_killed_at_twenty_random_points_and_the_identical_set(sampler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Here, so that the processes start with all imported.
    generate_to(sampler, ROWS, "whole", shard_rows=3, batch=2)
    whole = files(Path("whole"))
    assert {"00000.tar", "00002.parquet", "00001_stats.json", "shards.txt", "dataset_card.md"} < set(whole)
    assert read_index("whole").num_rows == 8
    assert run(sampler, "counted", watched) == 0
    # Some more or fewer from run to run, as threads take turns.
    closing, calls = map(int, Path("calls").read_text().split())
    draw, kills, found = random.Random(0), 0, Counter()
    while kills < KILLS:
        # The closing step is short: every other one is killed inside it.
        moment, out = draw.randrange(*(closing, calls) if kills % 2 else (0, closing)), Path(f"killed-{kills}")
        how = run(sampler, out, partial(watched, moment))
        assert how in (0, signal.SIGKILL)
        kills += how == signal.SIGKILL
        found[progress_of(out)] += 1
        # Shards are whole or not there.
        assert read_index(out).num_rows in (0, 3, 6, 8)
        assert run(sampler, out) == 0
        assert files(out) == whole
    # From before the first shard to the end of closing.
    assert len(found) >= 4, found
    assert found["closing"] + found["made"] >= 5, found
