"""The peak memory of a call is set by the budget, not by the number of pairs."""

import json
import os
import subprocess
import sys

import pytest

import dsd_fast as dsd
from tests.repository.source import ROOT

MIB = 1 << 20
BUDGET = 32 * MIB

# Prints the growth of the process's peak memory over a first small call, after each of the calls asked for.
MEASURE = """
import json, sys
import numpy as np
import dsd_fast as dsd

budget, sizes = json.loads(sys.argv[1])
config = dsd.MatchConfig(timesteps=[500], memory_budget=budget)
matcher = dsd.Matcher(dsd.load("mini"), config)

def peak_after(images, captions):
    pictures = np.random.default_rng(0).integers(0, 256, (images, 64, 64, 3), np.uint8)
    matcher.score(list(pictures), [f"caption {i}" for i in range(captions)])
    # Not ru_maxrss, which starts at the peak of the process that started this one.
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))

start = peak_after(2, 2)
print(json.dumps([peak_after(*size) - start for size in sizes]))
"""


def test_the_calls_measured_need_many_times_the_budget_at_once():
    plan = dsd.Matcher(dsd.load("mini"))._scorer.plan
    assert plan.run_bytes(32 * 33, 16, 16, 24) > 4 * BUDGET


@pytest.mark.alone
def test_peak_memory_stays_under_the_budget_and_does_not_grow_with_the_pairs():
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([BUDGET, [(8, 32), (32, 32)]])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout)
    # At least an eighth, or the measure saw nothing: norms in one pass leave nothing between.
    assert BUDGET / 8 < few <= many < BUDGET
    # What may grow with 24 more images: their pixels (1.5 MiB), their scores, and gaps in the heap.
    assert many - few < BUDGET / 4
