"""Features of SD 1.5 at 512 × 512 pixels on a GPU: 16 timesteps, the last layer of every up block, bfloat16."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsd_fast.bench.case import Context, Side, Target, Work
from dsd_fast.bench.suites.features_exit import LEVELS, last_module
from dsd_fast.bench.suites.features_rungs import PROMPT, Features, Job, Rows, batches, official, states
from dsd_fast.bench.suites.judging import MEASURE, TOLERANCE, Judge
from dsd_fast.bench.suites.shared import middles, on_h200
from dsd_fast.bench.suites.unet_networks import random_pipeline
from dsd_fast.features import FeatureExtractor
from dsd_fast.models import from_pipeline
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from dsd_fast.reference import features

IMAGES = 8
TIMESTEPS = 16
ROWS = 64
"""Of a call of compiled diffusers."""

RATE = 25.0
"""Images a second on an H200: 29 if the network ran at 46 % of the matmul peak and nothing else took time."""
RATIO = 3.5
"""Times faster than the official way."""

SHORT_MODE, LONG_MODE = "default", "max-autotune-no-cudagraphs"


def job(context: Context) -> Job:
    """The first evaluation scenes, enlarged, through SD 1.5's networks with random weights.

    What a feature costs does not depend on what the weights know, nor on the words.
    """

    def make() -> Job:
        model = from_pipeline(random_pipeline("sd15", context, torch.bfloat16))
        height, width = model.image_size
        drawn = [torch.from_numpy(scene(EVAL_SEED + i).image) for i in range(IMAGES)]
        images = [
            each.repeat_interleave(height // len(each), 0).repeat_interleave(width // each.shape[1], 1).numpy()
            for each in drawn
        ]
        return Job(model, images, middles(TIMESTEPS), [LEVELS[block] for block in LEVELS], ROWS)

    return context.shared("job on sd15", make)


def against_official(context: Context) -> Work:
    """The official way, one image and timestep a call, and the extractor by each runtime."""
    work = job(context)
    baseline = work.side("reference, one image and timestep a call", lambda each: official(each, 1), 1, against={})
    sides = [baseline, *_ours(work, {baseline.name: ("rate", "ratio")}, (None, "inductor", "cudagraph"))]
    return _judged(context, work, sides)


def against_compiled(mode: str, context: Context) -> Work:
    """Stock diffusers batched by hand and compiled, and the extractor compiled."""
    work = job(context)
    torch._dynamo.reset()
    gc.collect()
    name = f"diffusers by hand, {work.batch} rows a call, torch.compile ({mode})"
    run = compiled(work, mode)
    flops = _flops(work)
    baseline = work.side(name, lambda _: run(), min(work.batch, work.rows), flops=flops, against={})
    return _judged(context, work, [baseline, *_ours(work, {name: ()}, ("inductor", "cudagraph"))])


def compiled(work: Job, mode: str) -> Callable[[], Features]:
    """Stock diffusers as a user would compile it: the whole network, in channels-last, hooks that keep the layers.

    The VAE and the text encoder run once, all timesteps share calls.
    """
    network = _Tapped(copy.deepcopy(work.pipe.unet).to(memory_format=torch.channels_last), work.ids)
    call: Callable[..., Mapping[str, Tensor]] = torch.compile(network, mode=mode, dynamic=False)

    @torch.no_grad()
    def run() -> Features:
        found, text = Rows(work), states(work)
        for rows, latents, times in batches(work, work.batch):
            latents = latents.contiguous(memory_format=torch.channels_last)
            found.put(rows, call(latents, times, text.expand(len(latents), -1, -1)))
        return found.features()

    return run


class _Tapped(nn.Module):
    """A network whose call gives what hooks keep of it."""

    def __init__(self, unet: nn.Module, ids: list[str]) -> None:
        super().__init__()
        self.unet, self.kept = unet, dict[str, Tensor]()
        for name in ids:
            level = int(name.removeprefix("up-level")[0])
            last_module(unet, level).register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self.kept[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def forward(self, latents: Tensor, times: Tensor, states: Tensor) -> dict[str, Tensor]:
        self.unet(latents, times, states, return_dict=False)
        return dict(self.kept)


def _ours(work: Job, against: Mapping[str, Any], runtimes: tuple[str | None, ...]) -> list[Side]:
    """The extractor by each runtime; the compiled ones are meant to reach the targets."""
    sides = []
    for runtime in runtimes:
        extractor = FeatureExtractor(work.model, work.ids, work.timesteps)
        if runtime is not None:
            extractor.compile(runtime)
        name = "FeatureExtractor" if runtime is None else f"FeatureExtractor, {runtime}"
        targets = {
            baseline: _targets(wanted, work.model.device) if runtime is not None else ()
            for baseline, wanted in against.items()
        }
        sides.append(work.side(name, _extracting(extractor), work.rows, flops=_flops(work), against=targets))
    return sides


def _extracting(extractor: FeatureExtractor) -> Callable[[Job], Features]:
    return lambda work: extractor.extract(work.images, PROMPT)


def _targets(wanted: tuple[str, ...], device: torch.device) -> list[Target]:
    found = [Target("ratio", RATIO)] if "ratio" in wanted else []
    if "rate" in wanted and on_h200(device):
        found.append(Target("rate", RATE))
    return found


def _flops(work: Job) -> int:
    """Of the network alone, up to the last layer; the VAE's, a tenth of them, and the text encoder's are not in it."""
    height, width = work.extractor.latent_size
    tokens = int(work.pipe.tokenizer.model_max_length)
    return work.short.flops(latents=work.rows, texts=1, rows=work.rows, height=height, width=width, tokens=tokens)


def _judged(context: Context, work: Job, sides: list[Side]) -> Work:
    """Features of the first image, judged by the official way's own error in the type that is measured."""

    def judge() -> Judge:
        first = Job(work.model, work.images[:1], work.timesteps, work.ids)
        plain = official(first, 1)
        exact = copy.deepcopy(work.pipe).to(torch.float32)
        truth = features.extract(
            exact, first.images, layers=first.ids, timesteps=first.timesteps, prompts=PROMPT, batch_size=1
        )
        return Judge([truth[name] for name in work.ids], [plain[name] for name in work.ids])

    judging = context.shared("judge of sd15 features", judge)
    return Work(
        sides=sides,
        difference=lambda result, right: judging([result[name][:1] for name in work.ids], right),
        tolerance=TOLERANCE,
        accuracy=MEASURE.replace("plain torch", "the reference"),
        oracle=lambda: judging.truth,
        oracle_name="the reference in float32, 1 image",
        item="image",
        items=len(work.images),
        dtype=str(work.model.dtype).removeprefix("torch."),
    )
