"""Multi-timestep features: the FeatureExtractor beside the reference, where its speed comes from, and early exit."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dsd_fast.bench.case import Case, Context, Figure, Group, Quality, Side, Suite, Target, Work
from dsd_fast.bench.suites import features_exit as exits
from dsd_fast.bench.suites import features_gpu as gpu
from dsd_fast.bench.suites import features_rungs as rungs
from dsd_fast.bench.suites.features_rungs import Job
from dsd_fast.bench.suites.shared import BFLOAT16_TOLERANCE, middles, mini, of_types
from dsd_fast.bench.timing import median_interval, quantile
from dsd_fast.features.export import extract_to
from dsd_fast.models.mini.scenes import EVAL_SEED, scene

FEATURE_TOLERANCE = 3e-5
"""A float32 activation is off by 1e-5 of the largest, as a prediction is. The VAE and the text encoder, in batches of
another size too, and ᾱ, which diffusers multiplies up in float32, put about as much into what the network is given."""

IMAGES, TIMESTEPS = 32, 8

RUNS = 6
"""From which on the interval of a median covers 95 %."""

SHARD_ROWS = 4
"""Images of a shard. Of the last one's writing nothing can overlap with computing."""

TARGETS = {1: 4.0, 32: 1.5}
"""Images in a call of the reference → times faster than it."""


def _job(context: Context, images: int, timesteps: int, dtype: str = "float32") -> Job:
    """The first evaluation scenes on the mini model."""

    def make() -> Job:
        pictures = [scene(EVAL_SEED + i).image for i in range(images)]
        return Job(mini(context, dtype), pictures, middles(timesteps))

    return context.shared(f"features of {images}, {timesteps}, {dtype}", make)


def _work(job: Job, sides: list[Side], oracle: Callable[[], Any] | None = None) -> Work:
    return Work(
        sides=sides,
        difference=rungs.difference,
        tolerance=FEATURE_TOLERANCE,
        accuracy="largest relative difference of a feature",
        oracle=oracle,
        oracle_name="the reference, one image and timestep a call",
        item="image",
        items=len(job.images),
    )


def _extract(batch: int, context: Context) -> Work:
    """The reference with ``batch`` images in a call, stock diffusers batched by hand, and the extractor."""
    job = _job(context, IMAGES, TIMESTEPS)
    return _extract_job(job, batch, context)


def _extract_job(job: Job, batch: int, context: Context) -> Work:
    name = f"reference, {batch} image{'' if batch == 1 else 's'} a call"
    by_hand = "diffusers batched by hand"
    ours = rungs.extractor_side(job, against={name: [Target("ratio", TARGETS[batch])], by_hand: ()})
    sides = [
        job.side(name, partial(rungs.official, batch=batch), min(batch, len(job.images)), against={}),
        job.side(by_hand, rungs.images_together, min(job.batch, job.rows), against={name: ()}),
        ours,
    ]
    return _work(job, sides, lambda: _right(job, context))


def _right(job: Job, context: Context) -> Any:
    """The reference's features of a job, computed once."""
    return context.shared(f"right features of {len(job.images)}", lambda: rungs.one_by_one(job))


def _waterfall(context: Context) -> Work:
    job = _job(context, 8, TIMESTEPS)
    return _work(job, rungs.ladder(job))


def _types(context: Context) -> Work:
    return of_types(
        lambda dtype: rungs.extractor_side(_job(context, IMAGES, TIMESTEPS, dtype)),
        difference=rungs.relative_norm,
        tolerance=BFLOAT16_TOLERANCE,
        accuracy="largest relative difference of a layer",
        item="image",
        items=IMAGES,
    )


def overlap(job: Job) -> list[Figure]:
    """How much of the writing of features goes on while others are computed, the median share over a few runs.

    Each extracts into a new folder; its timeline says.
    """
    shares, seconds = [], []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            done = extract_to(job.extractor, Path(folder) / "features", job.images, rungs.PROMPT, shard_rows=SHARD_ROWS)
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


suite = Suite(
    name="features",
    groups=[
        Group("extract", f"{IMAGES} images at {TIMESTEPS} timesteps, the practical layers of the mini model"),
        Group("waterfall", f"Where the speed comes from: 8 images, {TIMESTEPS} timesteps", plot="waterfall"),
        Group("dtype", f"bfloat16 beside float32: {IMAGES} images at {TIMESTEPS} timesteps, the practical layers"),
        Group("early-exit", f"SD 1.5's network up to each up block, one row of {exits.SIDE} × {exits.SIDE} latents"),
        Group(
            "export",
            f"Extraction into a folder: {IMAGES} images at {TIMESTEPS} timesteps, the mini model, "
            f"{SHARD_ROWS} images a shard",
        ),
        Group(
            "sd15",
            f"{gpu.IMAGES} images of 512 × 512 pixels at {gpu.TIMESTEPS} timesteps, all up blocks of SD 1.5, bfloat16, "
            "random weights",
        ),
    ],
    cases=[
        *(
            Case(f"extract/mini/batch{batch}", "extract", partial(_extract, batch), devices=("cpu",))
            for batch in TARGETS
        ),
        Case("waterfall", "waterfall", _waterfall, devices=("cpu",)),
        Case("dtype/extract", "dtype", _types),
        *(
            Case(f"early-exit/sd15/{block}", "early-exit", partial(exits.work, block), repeats=9, devices=("cpu",))
            for block in exits.LEVELS
        ),
        Quality("export/overlap", "export", lambda context: overlap(_job(context, IMAGES, TIMESTEPS))),
        Case("sd15/against-official", "sd15", gpu.against_official, repeats=6, devices=("cuda",)),
        *(
            Case(f"sd15/against-{mode}", "sd15", partial(gpu.against_compiled, mode), 6, ("cuda",), long)
            for mode, long in ((gpu.SHORT_MODE, False), (gpu.LONG_MODE, True))
        ),
    ],
)
