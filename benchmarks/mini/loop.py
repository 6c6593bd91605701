"""What the trainings of the mini model's parts share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from rich.progress import track
from torch import Tensor
from torch.nn import Parameter

from dsd_fast.jobs import locked, read_tensors, write_tensors
from dsd_fast.training import CHECKPOINT, Descent, FitRecord, reporting


@dataclass(frozen=True)
class Recipe:
    """How a part is optimised: AdamW, linear warm-up, then constant, then a cosine to zero from `decay_from` on."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100
    decay_from: float = 0.5
    weight_decay: float = 0.01
    ema: float = 0.998
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        start = self.decay_from * self.steps
        share = max(0.0, step - start) / max(1.0, self.steps - start)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * share))


def generator(seed: int, step: int) -> torch.Generator:
    """The generator of everything random in one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def rows(recipe: Recipe, step: int, pictures: int) -> Tensor:
    """Which pictures a step has: all but a rest in an order of the epoch's, one epoch after the other."""
    epoch, start = divmod(step * recipe.batch, pictures - pictures % recipe.batch)
    order = torch.randperm(pictures, generator=generator(recipe.seed + 1, epoch), device="cpu")
    return order[start : start + recipe.batch]


class NoiseLoss:
    """The error of a predicted noise, by timestep weighed as min-SNR-5 (Hang et al. 2023) with a floor.

    The floor is there since where objects lie relative to each other is decided where hardly any signal is left.
    """

    def __init__(self, schedule: DDPMScheduler) -> None:
        self._schedule = schedule
        snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
        self._weights = snr.clamp(0.1, 5) / snr

    def draw(self, latents: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noised latents, timesteps and noise; one timestep from each of the batch's equal parts of the schedule."""
        count = len(latents)
        strata = torch.randperm(count, generator=random, device="cpu") + uniform(count, random)
        timesteps = (strata * (1000 / count)).long().clamp(max=999)
        noise = torch.randn(latents.shape, generator=random, dtype=torch.float32, device="cpu")
        return self._schedule.add_noise(latents, noise, timesteps), timesteps, noise

    def __call__(self, predicted: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The mean over the batch."""
        weighted: Tensor = self._weights[timesteps] * (predicted - noise).square().mean((1, 2, 3))
        return weighted.mean()


def uniform(count: int, random: torch.Generator) -> Tensor:
    """(count,) numbers from 0 to 1."""
    return torch.rand(count, generator=random, dtype=torch.float32, device="cpu")


@torch.no_grad()
def made_once(file: Path, pictures: int, make: Callable[[range], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives for the numbers of some pictures, of all of them; from `file` where it is there."""
    if file.exists():
        data, about = read_tensors(file)
        if about.get("pictures") == pictures:
            return data
    starts = track(range(0, pictures, 64), "pictures", transient=True)
    parts = [make(range(start, min(start + 64, pictures))) for start in starts]
    data = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    write_tensors(file, data, {"pictures": pictures})
    return data


class _TimeUpError(Exception):
    pass


def fit(
    name: str,
    parameters: dict[str, Parameter],
    loss: Callable[[int], Tensor],
    recipe: Recipe,
    folder: Path,
    *,
    rates: Callable[[str], float] = lambda _: 1.0,
    minutes: float | None = None,
    save_every: float = 60.0,
) -> bool:
    """Trains `parameters` on `loss(step)` and leaves their average for `average`.

    Args:
        rates: factor on the learning rate by parameter name.
        minutes: stop after this long, but not before one step, with a checkpoint; None runs to the end.
        save_every: seconds between checkpoints; 0 saves after every step.

    Returns:
        Whether the training is complete.

    Raises:
        ValueError: the folder holds a checkpoint of another recipe. The number of steps may differ, which gives the
            same result as long as the learning rate has not begun to fall.
    """
    began = time.monotonic()

    def stop(step: int, loss: float | None, record: FitRecord | None) -> None:
        if loss is not None and minutes is not None and time.monotonic() - began >= 60 * minutes:
            raise _TimeUpError

    with locked(folder / name), reporting(name, recipe.steps, stop) as report, suppress(_TimeUpError):
        descent = Descent(
            parameters,
            lambda step, backward: backward(loss(step)),
            lambda key: (rates(key), parameters[key].ndim > 1),
            lambda group, step: recipe.rate_at(step) * group[0],
            lambda group: recipe.weight_decay if group[1] else 0.0,
            steps=recipe.steps,
            clip_norm=1.0,
            betas=(0.9, 0.99),
            average=recipe.ema,
            validate_every=100,
            folder=folder / name,
            fingerprint={key: value for key, value in asdict(recipe).items() if key != "steps"},
            save_every=save_every,
            report=report,
        )
        descent.run()
    return descent.progress.step >= recipe.steps


def average(folder: Path, name: str, prefix: str = "") -> dict[str, Tensor]:
    """The average that `fit` has left, of the parameters whose names start with `prefix`, without it."""
    return read_tensors(folder / name / CHECKPOINT, f"ema.{prefix}")[0]
