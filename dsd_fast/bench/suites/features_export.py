"""Writing while computing: what share of the writing of features goes on while others are computed."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from dsd_fast.bench.case import Figure
from dsd_fast.bench.suites.features_rungs import PROMPT, Job
from dsd_fast.bench.timing import median_interval, quantile
from dsd_fast.features.export import extract_to

RUNS = 6
"""From which on the interval of a median covers 95 %."""

SHARD_ROWS = 4
"""Images of a shard. Of the last one's writing nothing can overlap with computing."""


def overlap(job: Job) -> list[Figure]:
    """The median share over a few runs, each into a new folder, from the extraction's timeline."""
    shares, seconds = [], []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            done = extract_to(job.extractor, Path(folder) / "features", job.images, PROMPT, shard_rows=SHARD_ROWS)
            seconds.append((time.perf_counter() - start) / len(job.images))
        shares.append(done.overlap)
    low, high, _ = median_interval(shares)
    sizes = {"images": len(job.images), "timesteps": len(job.timesteps), "shard_rows": SHARD_ROWS}
    return [
        Figure(
            "share of the writing during computing",
            quantile(shares, 0.5),
            low,
            high,
            RUNS,
            sizes=sizes,
            seconds=quantile(seconds, 0.5),
            item="image",
        )
    ]
