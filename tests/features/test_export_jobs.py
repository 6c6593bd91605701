"""An extraction into a folder that is killed, and how much memory it takes."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest

import dsd_fast as dsd
from dsd_fast.features.export import extract_to
from dsd_fast.jobs import read_index
from tests.features.test_export import LAYERS, features_of, save_pictures
from tests.jobs.numbers import ended, files, start
from tests.jobs.test_killed import count_calls, kill
from tests.repository.source import ROOT
from tests.tiny import tiny_pipeline

MIB = 1 << 20
BUDGET = 16 * MIB


def test_killed_twenty_times_and_the_same_in_the_end(tmp_path, monkeypatch):
    # A kill, unlike a power failure, takes nothing back that was written.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    extractor = dsd.FeatureExtractor(dsd.from_pipeline(tiny_pipeline("sd15")), ["down-level0-repeat0-res-out"])
    pictures = save_pictures(tmp_path / "pictures")

    def extract(name, layout):
        return extract_to(extractor, tmp_path / name, pictures, shard_rows=3, layout=layout).counts

    draw, kills = random.Random(0), 0
    for layout in ("shards", "npy-layer"):
        moments = []

        def whole(layout=layout, moments=moments):
            count_calls(lambda number: moments.append(number))
            extract(f"whole-{layout}", layout)
            (tmp_path / f"moments-{layout}").write_text(str(len(moments)))

        assert ended(start(whole)) == 0
        count = int((tmp_path / f"moments-{layout}").read_text())
        for round in range(4):
            folder = f"{layout}-{round}"
            for _ in range(3):
                # A third of all moments at most, so that there is something left to kill.
                moment = draw.randrange(count // 3)

                def child(folder=folder, layout=layout, moment=moment):
                    count_calls(lambda number: kill() if number == moment else None)
                    extract(folder, layout)

                how = ended(start(child))
                assert how in (0, signal.SIGKILL)
                kills += how == signal.SIGKILL
            counts = extract(folder, layout)
            assert counts.inputs == counts.ok + counts.errors + counts.done == 12
            # Equal to the bit: shards begin where batches begin.
            assert files(tmp_path / folder) == files(tmp_path / f"whole-{layout}")
    assert kills >= 20
    assert len(features_of(tmp_path / "shards-0")) == 11
    assert read_index(tmp_path / "npy-layer-0").num_rows == 12


# Prints the growth of the process's peak memory over a first small call, after each of the calls asked for.
MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
import dsd_fast as dsd
from dsd_fast.features.export import extract_to

budget, layers, sizes, folder = json.loads(sys.argv[1])
extractor = dsd.FeatureExtractor(dsd.load("mini"), layers, timesteps=[50] * 8, memory_budget=budget)

def images(count):
    for number in range(count):
        yield np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)

def peak_after(count):
    done = extract_to(extractor, Path(folder) / str(count), images(count))
    assert done.counts.ok == count
    # Not ru_maxrss, which starts at the peak of the process that started this one.
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))

# The first one loads what it needs, and the heap finds its size in the second.
peak_after(2)
start = peak_after(3)
shapes = extractor.shapes.values()
row = 8 * 4 * sum(channels * height * width for channels, height, width in shapes)
print(json.dumps([row, [peak_after(size) - start for size in sizes]]))
"""


@pytest.mark.alone
def test_memory_stays_under_the_budget_and_does_not_grow_with_the_images(tmp_path):
    arguments = json.dumps([BUDGET, list(LAYERS), [24, 72], str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    row, (few, many) = json.loads(done.stdout)
    # All features at once would be far more than the budget and what is on its way to the disk.
    assert 72 * row > 2 * BUDGET
    assert few <= many < BUDGET
    # What may grow with 48 more images: their ids and names, and gaps in the heap.
    assert many - few < 48 * row / 4
