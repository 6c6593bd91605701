"""How well a mini model's noise prediction tells true captions from nearly true ones, by stock diffusers alone.

`python -m dsd_fast.models.mini.evaluate --n 300 --timesteps 4 --timesteps 16`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import DDPMScheduler, StableDiffusionPipeline
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from . import path
from .digits import EVALUATION, caption, digit
from .networks import preprocess
from .scenes import EVAL_SEED, NEGATIVE_KINDS, scene

__all__ = ["Figure", "evaluate", "noise_errors"]


@dataclass(frozen=True)
class Figure:
    """An accuracy: `right` of `n`, `ways` captions to choose from, so chance is 1 / `ways`."""

    name: str
    timesteps: int
    ways: int
    right: int
    n: int

    @property
    def accuracy(self) -> float:
        """Share of right choices; nan without any."""
        return self.right / self.n if self.n else math.nan


@torch.inference_mode()
def noise_errors(
    pipe: StableDiffusionPipeline, image: np.ndarray, captions: list[str], timesteps: int, seed: int = 0
) -> Tensor:
    """Mean over timesteps of the L2 norm of the noise prediction's error, float32 (captions,); smaller fits better.

    The timesteps are the middles of equal parts of the schedule. Noise depends on `seed` and the timestep's place in
    the list alone, so it is the same for every picture. `image` is uint8 (64, 64, 3).
    """
    latents = pipe.vae.encode(preprocess(torch.from_numpy(image)[None])).latent_dist.mean
    latents = latents * pipe.vae.config.scaling_factor
    count = len(captions)
    draws = [torch.Generator().manual_seed(seed * 100_003 + place) for place in range(timesteps)]
    noise = torch.cat([torch.randn(latents.shape, generator=draw) for draw in draws])
    times = torch.tensor([int((place + 0.5) * 1000 / timesteps) for place in range(timesteps)])
    noised = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents.expand_as(noise), noise, times)
    states = pipe.encode_prompt(captions, "cpu", 1, False)[0]
    rows = (noised.repeat(count, 1, 1, 1), times.repeat(count), states.repeat_interleave(timesteps, 0))
    predicted = pipe.unet(*rows).sample
    error: Tensor = (predicted - noise.repeat(count, 1, 1, 1)).flatten(1).norm(dim=1)
    return error.view(count, timesteps).mean(1)


def evaluate(pipe: StableDiffusionPipeline, n: int = 1000, timesteps: tuple[int, ...] = (4, 16)) -> list[Figure]:
    """Accuracies on `n` new scenes, `n` scenes with a held-out pair, and the evaluation digits (at most `n`).

    `3-way` sets the caption against two of its colour, shape and swap negatives, chosen by the seed; the kinds alone
    are 2-way; a digit's caption stands against three other digits'.
    """
    figures = []
    for steps in timesteps:
        for group, held_out in (("new scenes", False), ("held-out pairs", True)):
            figures += _scenes(pipe, n, steps, group, held_out)
        right = 0
        indices = list(EVALUATION)[:n]
        for index in track(indices, f"digits, T = {steps}", transient=True):
            drawn = digit(index, EVAL_SEED)
            others = np.random.default_rng((index, 4)).permutation([x for x in range(10) if x != drawn.label])[:3]
            captions = [drawn.caption, *(caption(int(other)) for other in others)]
            right += int(noise_errors(pipe, drawn.image, captions, steps).argmin() == 0)
        figures.append(Figure("digits", steps, 4, right, len(indices)))
    return figures


def _scenes(pipe: StableDiffusionPipeline, n: int, steps: int, group: str, held_out: bool) -> list[Figure]:
    right, total = dict.fromkeys(("3-way", *NEGATIVE_KINDS), 0), dict.fromkeys(("3-way", *NEGATIVE_KINDS), 0)
    for seed in track(range(EVAL_SEED, EVAL_SEED + n), f"{group}, T = {steps}", transient=True):
        picture = scene(seed, held_out=held_out)
        negatives = picture.negatives()
        errors = noise_errors(pipe, picture.image, [picture.caption, *negatives.values()], steps)
        better = dict(zip(negatives, (errors[1:] > errors[0]).tolist(), strict=True))
        kinds = [kind for kind in ("colour", "shape", "swap") if kind in better]
        if len(kinds) == 3:
            kinds.pop(seed % 3)
        better["3-way"] = all(better[kind] for kind in kinds)
        for kind, won in better.items():
            right[kind] += won
            total[kind] += 1
    return [Figure(f"{group}, {kind}", steps, 3 if kind == "3-way" else 2, right[kind], total[kind]) for kind in right]


def main(
    folder: Annotated[Path | None, typer.Argument(help="A weights folder; the shipped one if not given.")] = None,
    n: Annotated[int, typer.Option(min=1, help="Scenes a figure.")] = 1000,
    timesteps: Annotated[list[int] | None, typer.Option(help="Timesteps a pair; repeat for more figures.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Prints accuracies with n and 95 % Wilson intervals."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    source = folder or path()
    pipe = StableDiffusionPipeline.from_pretrained(source, local_files_only=True)
    table = Table("captions", "T", "accuracy", "95 %", "chance", "n", title=str(source))
    for figure in evaluate(pipe, n, tuple(timesteps or (4, 16))):
        low, high = wilson(figure.right, figure.n)
        chance = f"{1 / figure.ways:.2f}"
        row = (figure.name, str(figure.timesteps), f"{figure.accuracy:.3f}", f"{low:.2f} to {high:.2f}", chance)
        table.add_row(*row, str(figure.n))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
