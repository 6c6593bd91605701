"""What leaving network steps out costs in quality: generated pictures that show what was asked for, by the judge.

Every setting draws the same prompts from the same seeds. The speed of each is that of a few pictures beside the stock
pipeline's, in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import nn

from benchmarks.mini.networks import preprocess
from benchmarks.suites.mini_card.judge import judge, look
from benchmarks.suites.mini_card.pictures import GUIDANCE, STEPS
from dsd_fast.bench.case import Context, Figure, Group, Quality, Suite
from dsd_fast.bench.measure import timer_for
from dsd_fast.bench.suites.generate import FEWER, Job
from dsd_fast.bench.suites.shared import mini
from dsd_fast.bench.timing import interleave, ratio
from dsd_fast.engine.clip import ClipSpace
from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler
from dsd_fast.generation.sampler import to_uint8
from dsd_fast.metrics import clip_score, frechet_distance
from dsd_fast.models.mini.scenes import EVAL_SEED, scene

__all__ = ["N", "quality", "suite"]

N = 1000
"""Pictures of one object each, new scenes."""

SAMPLER = "ddim"
TIMED, REPEATS = 32, 7
_AT_ONCE = 32


def quality(name: str, options: Mapping[str, Any], context: Context, n: int = N) -> list[Figure]:
    """How many of the pictures show the object in colour, shape and size, how near they are, and how fast they come."""
    model = mini(context)
    seeing: nn.Module = context.shared("judge", lambda: judge(model.vae).to(model.device))
    scenes = [scene(EVAL_SEED + i, objects=1) for i in range(n)]
    asked = [each.objects[0] for each in scenes]
    prompts = [f"a {item.size} {item.colour} {item.shape}" for item in asked]
    config = GenerateConfig(steps=STEPS, guidance=GUIDANCE, scheduler=SAMPLER, **options)
    pictures = drawn(Sampler(model, config), prompts)
    found = [each.objects for each in look(seeing, pictures)]
    right = sum(seen == {item.colour: (item.shape, item.size)} for seen, item in zip(found, asked, strict=True))
    real = context.shared("real", lambda: features(seeing, np.stack([each.image for each in scenes])))
    distance = frechet_distance(real, features(seeing, pictures))
    space = ClipSpace(model)
    with torch.no_grad():
        embeds = torch.cat(
            [space.of_pixels(preprocess(each)) for each in torch.split(torch.from_numpy(pictures), _AT_ONCE)]
        )
        alike = clip_score(embeds.cpu(), space.of_texts(prompts).cpu())
    job = Job(model, SAMPLER, TIMED, options)
    # The first call of either pays for what later ones do not.
    job.images()
    job.own_images()
    stock, ours = interleave([job.images, job.own_images], REPEATS, timer_for(context.device))
    times, seconds, sizes = ratio(stock, ours), float(np.median(ours)) / TIMED, {"steps": STEPS}
    return [
        Figure.share(f"{name}: right", right, n, sizes=sizes, seconds=seconds, item="picture"),
        Figure(f"{name}: Fréchet distance", distance, distance, distance, n, unit="distance", sizes=sizes),
        Figure(f"{name}: CLIP score", alike, alike, alike, n, unit="cosine in hundredths", sizes=sizes),
        Figure(
            f"{name}: times faster than diffusers",
            times.median,
            times.low,
            times.high,
            REPEATS,
            unit="times faster",
            sizes={**sizes, "pictures": TIMED},
        ),
    ]


@torch.inference_mode()
def features(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """What the judge's last layer reads of uint8 (N, 64, 64, 3) images, (N, 256)."""
    kept: list[torch.Tensor] = []
    answer = network.get_submodule("answer")
    handle = answer.register_forward_pre_hook(lambda _, given: kept.append(given[0].cpu()))
    try:
        look(network, images)
    finally:
        handle.remove()
    return torch.cat(kept).numpy()


@torch.no_grad()
def drawn(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int] | None = None) -> np.ndarray:
    """Pictures of the prompts, uint8 (N, H, W, 3); picture k has the seed k, unless others are given."""
    rows = [
        sampler.resolve(GenerateRow(prompt, seed))
        for prompt, seed in zip(prompts, range(len(prompts)) if seeds is None else seeds, strict=True)
    ]
    starts = range(0, len(rows), _AT_ONCE)
    made = [
        to_uint8(sampler.pixels(rows[start : start + _AT_ONCE])) for start in track(starts, "pictures", transient=True)
    ]
    return torch.cat(made).numpy()


suite = Suite(
    "generate-quality",
    groups=(
        Group(
            "fewer",
            f"What may be left out, and what it costs: {N:,} pictures of one object, DDIM, {STEPS} steps, "
            f"guidance {GUIDANCE:g}, the mini model; times of {TIMED} pictures at once, distances by "
            "the judge's features",
            columns=": ",
        ),
    ),
    cases=tuple(
        Quality(f"fewer/{place}", "fewer", partial(quality, name, options))
        for place, (name, options) in enumerate(FEWER.items())
    ),
)
