"""The peak memory of a call is set by the budget, not by the number of pairs."""

import json
import os
import subprocess
import sys

from tests.repository.source import ROOT

MIB = 1 << 20
BUDGET = 64 * MIB

# Prints the growth of the process's peak memory over a first small call, after each of the calls asked for.
MEASURE = """
import json, sys
import numpy as np
import dsd_fast as dsd

budget, sizes = json.loads(sys.argv[1])
config = dsd.MatchConfig(timesteps=[500], image_size=(32, 32), memory_budget=budget)
matcher = dsd.Matcher(dsd.load("mini"), config)

def peak_after(count):
    pictures = np.random.default_rng(0).integers(0, 256, (count, 48, 48, 3), np.uint8)
    matcher.score(list(pictures), [f"caption {i}" for i in range(count)])
    # Not ru_maxrss, which starts at the peak of the process that started this one.
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))

start = peak_after(2)
print(json.dumps([peak_after(count) - start for count in sizes]))
"""


def test_peak_memory_stays_under_the_budget_and_does_not_grow_with_the_pairs():
    # glibc keeps freed blocks of up to 32 MiB in its heap, where the gaps between them are resident too. A fixed
    # threshold gives every large block back at once, so that the peak is that of what is in use.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([BUDGET, [32, 64]])],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout)
    # Both fill micro-batches: 32 × 32 pairs and their unconditional rows are about three, 64 × 64 about eleven.
    assert BUDGET / 4 < few < BUDGET
    assert many < BUDGET
    # What may grow: the keys of 32 more texts (5 MiB, within the budget), 32 more pictures and rows of scores (1 MiB),
    # and oneDNN's code for the sizes of the last micro-batches. All rows at once would take over 700 MiB.
    assert many - few < 12 * MIB
