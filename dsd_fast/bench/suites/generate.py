"""Images from texts: the Sampler beside the stock pipeline batched by hand, on the mini model and at SD 1.5's size."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsd_fast.bench.case import Case, Context, Figure, Group, Quality, Side, Suite, Target, Work
from dsd_fast.bench.suites.judging import MEASURE, TOLERANCE, Judge
from dsd_fast.bench.suites.shared import mini, on_h200, relative
from dsd_fast.bench.suites.unet_networks import ARCHITECTURES, TOKENS, random_pipeline
from dsd_fast.diffusion import named_scheduler, noise, scheduler_timesteps
from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler, generate
from dsd_fast.generation.export import generate_to
from dsd_fast.models import Model, from_pipeline
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from dsd_fast.unet import UNetProgram

STEPS, GUIDANCE = 20, 3.0

LATENT_TOLERANCE = 1e-4
"""Of a latent, relative to the largest: a float32 prediction is off by 1e-5 of its largest value, and guidance
magnifies what its two rows differ by."""

TARGETS = {1: 1.0, 32: 1.15}
"""Images at once → times faster than the stock pipeline."""

SAMPLERS = ("ddim", "dpm++2m")

RATE = 11.6
"""Images a second of SD 1.5 on an H200, 20 steps with guidance, if the network ran at 46 % of the matmul peak and
nothing else took time."""

LARGE = 8
"""Images at once at SD 1.5's size."""

WRITTEN = 4
"""Images of 512 × 512 pixels that are written, each a shard."""

FEWER: Mapping[str, Mapping[str, Any]] = {
    "guidance at every step": {},
    "guidance where 0.3 < σ ≤ 5.5": {"guidance_interval": (0.3, 5.5)},
    "guidance where 1 < σ": {"guidance_interval": (1.0, None)},
    "guidance where 0.5 < σ": {"guidance_interval": (0.5, None)},
    "deep activations kept for 2 steps": {"cache_interval": 2},
    "deep activations kept for 3 steps": {"cache_interval": 3},
    "guidance where 0.5 < σ and kept for 2 steps": {"guidance_interval": (0.5, None), "cache_interval": 2},
    "guidance where 0.5 < σ and kept for 3 steps": {"guidance_interval": (0.5, None), "cache_interval": 3},
    "kept for 2 steps, branch 1": {"cache_interval": 2, "cache_branch_id": 1},
    "guidance where 0.3 < σ and kept for 2 steps, branch 1": {
        "guidance_interval": (0.3, None),
        "cache_interval": 2,
        "cache_branch_id": 1,
    },
    "guidance where 0.3 < σ and kept for 2 steps, branch 2": {
        "guidance_interval": (0.3, None),
        "cache_interval": 2,
        "cache_branch_id": 2,
    },
    "guidance where 0.2 < σ and kept for 2 steps, branch 2": {
        "guidance_interval": (0.2, None),
        "cache_interval": 2,
        "cache_branch_id": 2,
    },
}
"""What of the network's work is left out, by its name."""


@dataclass(frozen=True)
class Job:
    """Prompts and seeds for a model and a sampler.

    Attributes:
        model: that draws them.
        sampler: a name of :data:`dsd_fast.diffusion.schedulers.SAMPLERS`.
        count: of images, the captions of the first evaluation scenes.
        options: of ours besides.
    """

    model: Model
    sampler: str
    count: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def prompts(self) -> list[str]:
        return [scene(EVAL_SEED + i).caption for i in range(self.count)]

    @cached_property
    def rows(self) -> list[GenerateRow]:
        return [GenerateRow(prompt, seed) for seed, prompt in enumerate(self.prompts)]

    @cached_property
    def config(self) -> GenerateConfig:
        return GenerateConfig(steps=STEPS, guidance=GUIDANCE, scheduler=self.sampler, **self.options)

    @cached_property
    def ours(self) -> Sampler:
        return Sampler(self.model, self.config)

    @cached_property
    def pipe(self) -> Any:
        pipe = self.model.to_pipeline()
        pipe.scheduler = named_scheduler(self.sampler, self.model.new_scheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def stock(self, kind: str) -> Any:
        """What the pipeline gives for all prompts in one call, from the noise that ours start from."""
        shape = (self.model.latent_channels, *self.model.latent_size())
        start = torch.stack([noise(seed, 0, shape) for seed in range(self.count)])
        return self.pipe(
            self.prompts,
            latents=start.to(self.model.device, self.model.dtype),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type=kind,
        ).images

    def images(self) -> Tensor:
        """(count, H, W, 3) uint8 of the stock pipeline."""
        return _bytes(self.stock("pil"))

    def own_images(self) -> Tensor:
        """(count, H, W, 3) uint8 of :func:`dsd_fast.generate`."""
        return _bytes(list(generate(self.model, self.rows, self.config)))

    @torch.no_grad()
    def own_latents(self) -> Tensor:
        """(count, C, h, w) before the VAE."""
        return self.ours.latents([self.ours.resolve(row) for row in self.rows])


def _bytes(images: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def _job(context: Context, sampler: str, count: int) -> Job:
    return context.shared(f"{count} images by {sampler}", lambda: Job(mini(context), sampler, count))


def _sides(job: Job, stock: Callable[[], Any], own: Callable[[], Any], name: str) -> list[Side]:
    by_hand = f"diffusers, {job.count} image{'' if job.count == 1 else 's'} a call"
    sizes, batch = {"images": job.count, "steps": STEPS}, 2 * job.count
    return [
        Side(by_hand, stock, batch, sizes, against={}),
        Side(name, own, batch, sizes, against={by_hand: [Target("ratio", TARGETS[job.count])]}),
    ]


def latents(sampler: str, count: int, context: Context) -> Work:
    """Texts and the network alone."""
    job = _job(context, sampler, count)
    return Work(
        sides=_sides(job, lambda: job.stock("latent"), job.own_latents, "Sampler.latents"),
        difference=relative,
        tolerance=LATENT_TOLERANCE,
        accuracy="largest relative difference of a latent",
        oracle_name="the stock pipeline",
        item="image",
        items=count,
    )


def images(sampler: str, count: int, context: Context) -> Work:
    """From the texts to PIL images."""
    job = _job(context, sampler, count)
    return Work(
        sides=_sides(job, job.images, job.own_images, "generate"),
        difference=lambda result, right: float((result.int() - right.int()).abs().max()),
        # Rounding to bytes may tip.
        tolerance=1.0,
        accuracy="largest difference of a level",
        oracle_name="the stock pipeline",
        item="image",
        items=count,
    )


def flops(context: Context) -> list[Figure]:
    """FLOPs of an image at SD 1.5's size by what is left out, texts and decoder aside: counted, nothing is run."""
    from diffusers import UNet2DConditionModel

    architecture, model = ARCHITECTURES["sd15"], mini(context)
    with torch.device("meta"):
        program = UNetProgram(UNet2DConditionModel(**architecture.config))
    sizes = {"texts": 0, "height": architecture.side, "width": architecture.side, "tokens": TOKENS}
    scheduler = named_scheduler("ddim", model.new_scheduler())
    times = scheduler_timesteps(scheduler, STEPS)
    whole = program.plan(noise_pred=True)
    figures = [_count("diffusers, two rows at every step", STEPS * whole.flops(latents=2, rows=2, **sizes))]
    for name, options in FEWER.items():
        shallow = program.plan(noise_pred=True, enter=program.entries[options.get("cache_branch_id", 0)])
        low, high = options.get("guidance_interval", (0.0, None))
        total = 0
        for number, t in enumerate(times):
            plan = shallow if number % options.get("cache_interval", 1) else whole
            total += plan.flops(
                latents=1, rows=2 if low < model.schedule.sigma(t) <= (high or math.inf) else 1, **sizes
            )
        figures.append(_count(name, total))
    return figures


def _count(name: str, count: int) -> Figure:
    value = count / 1e12
    return Figure(name, value, value, value, 1, unit="TFLOP", sizes={"steps": STEPS})


def overlap(context: Context) -> list[Figure]:
    """How much of encoding and of writing goes on while images are computed, by the timeline of one run.

    One step of the network without guidance each: what is beside it is so as large a part as it can be.
    """
    model = from_pipeline(random_pipeline("sd15", context, torch.float32))
    sampler = Sampler(model, GenerateConfig(steps=1, guidance=1.0, scheduler="ddim"))
    rows = [GenerateRow("a photo", seed) for seed in range(WRITTEN)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = generate_to(sampler, rows, Path(folder) / "images", shard_rows=1, batch=1)
        seconds = (time.perf_counter() - start) / WRITTEN
    shares = {"encoding": done.encode_overlap, "writing": done.overlap}
    return [
        Figure(f"share of the {name} during computing", share, share, share, 1, seconds=seconds, item="image")
        for name, share in shares.items()
    ]


def large(context: Context) -> Work:
    """SD 1.5 with random weights in bfloat16 on a GPU, from texts to images; latents are what is compared."""
    job = Job(from_pipeline(random_pipeline("sd15", context, torch.bfloat16)), "ddim", LARGE)
    exact = Job(from_pipeline(copy.deepcopy(job.pipe).to(torch.float32)), "ddim", 1)
    first = Job(job.model, "ddim", 1)
    judge = Judge([exact.stock("latent")], [first.stock("latent")])
    decoded = job.model.decode_latents
    stock = "diffusers, eager"
    sizes = {"images": LARGE, "steps": STEPS}
    sides = [Side(stock, partial(_both, decoded, lambda: job.stock("latent")), 2 * LARGE, sizes, against={})]
    targets = [Target("rate", RATE)] if on_h200(job.model.device) else []
    for runtime in (None, "cudagraph"):
        own = Job(job.model, "ddim", LARGE)
        if runtime is not None:
            own.ours.engine.compile(runtime)
        name = "Sampler" if runtime is None else f"Sampler, {runtime}"
        wanted = targets if runtime is not None else []
        sides.append(Side(name, partial(_both, decoded, own.own_latents), 2 * LARGE, sizes, against={stock: wanted}))
    return Work(
        sides=sides,
        difference=lambda result, right: judge([result[:1]], right),
        tolerance=TOLERANCE,
        accuracy=MEASURE.replace("plain torch", "diffusers"),
        oracle=lambda: judge.truth,
        oracle_name="diffusers in float32, 1 image",
        item="image",
        items=LARGE,
        dtype="bfloat16",
    )


@torch.no_grad()
def _both(decode: Callable[[Tensor], Tensor], latents: Callable[[], Tensor]) -> Tensor:
    """Latents, after their images have been decoded, too."""
    found = latents()
    decode(found)
    return found


suite = Suite(
    name="generate",
    groups=[
        Group("images", f"From texts to images: the mini model, {STEPS} steps, guidance {GUIDANCE:g}"),
        Group("latents", f"The same without the VAE's decoder and PIL: {STEPS} steps, guidance {GUIDANCE:g}"),
        Group("flops", f"FLOPs of the network for an image of SD 1.5's size, 512 × 512 pixels, {STEPS} steps"),
        Group(
            "overlap",
            f"{WRITTEN} images of 512 × 512 pixels into a folder, SD 1.5's networks with random weights, one step each",
        ),
        Group(
            "sd15", f"{LARGE} images of 512 × 512 pixels, {STEPS} steps with guidance, SD 1.5, bfloat16, random weights"
        ),
    ],
    cases=[
        *(
            Case(f"{group}/{sampler}/{count}", group, partial(work, sampler, count), devices=("cpu",))
            for group, work in (("images", images), ("latents", latents))
            for sampler in SAMPLERS
            for count in TARGETS
        ),
        Quality("flops/sd15", "flops", flops),
        Quality("overlap/sd15", "overlap", overlap, long=True),
        Case("sd15/images", "sd15", large, repeats=6, devices=("cuda",)),
    ],
)
