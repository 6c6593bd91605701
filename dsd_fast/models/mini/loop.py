"""A training loop that can be killed at any moment and goes on as if it had not been.

Whatever a step draws is a function of the step's number, so a checkpoint is the parameters, their average, the
optimiser's state and the step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import Parameter

from dsd_fast.jobs import read_tensors, write_tensors

__all__ = ["Recipe", "fit", "generator", "noise_weights"]


@dataclass(frozen=True)
class Recipe:
    """How a stage is optimised: AdamW, linear warm-up, then constant, then a cosine to zero from `decay_from` on."""

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


def noise_weights(alphas_cumprod: Tensor) -> Tensor:
    """Weigh each timestep's noise loss: min-SNR-5 (Hang et al. 2023) with a floor.

    The floor is there since where objects lie relative to each other is decided where hardly any signal is left.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(0.1, 5) / snr


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
    """Trains `parameters` on `loss(step)` and leaves their average in `<folder>/<name>.safetensors` under `ema.`.

    Args:
        rates: factor on the learning rate by parameter name.
        minutes: stop after this long, but not before one step, with a checkpoint; None runs to the end.
        save_every: seconds between checkpoints; 0 saves after every step.

    Returns:
        Whether the stage is complete.

    Raises:
        ValueError: the folder holds a checkpoint of another recipe. The number of steps may differ, which gives the
            same result as long as the learning rate has not begun to fall.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.safetensors"
    settings = {key: value for key, value in vars(recipe).items() if key != "steps"}
    groups = [
        {"params": [p], "scale": rates(key), "weight_decay": recipe.weight_decay if p.ndim > 1 else 0.0}
        for key, p in parameters.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.99), fused=True)
    average = {key: p.detach().clone() for key, p in parameters.items()}
    step = _restore(file, settings, parameters, average, optimizer) if file.exists() else 0

    def save() -> None:
        state = {f"model.{key}": p for key, p in parameters.items()} | {f"ema.{k}": v for k, v in average.items()}
        for key, p in parameters.items():
            state |= {f"adam.{key}.{field}": value for field, value in optimizer.state[p].items()}
        write_tensors(file, state, {"step": step, "settings": settings})

    begin = saved = logged = time.monotonic()
    first, recent = step, 0.0
    with _progress() as bar, (folder / f"{name}.jsonl").open("a") as log:
        task = bar.add_task(name, total=recipe.steps, completed=step, status="")
        while step < recipe.steps:
            if minutes is not None and step > first and time.monotonic() - begin >= 60 * minutes:
                break
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step) * group["scale"]
            value = loss(step)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0, foreach=True)
            optimizer.step()
            # A young average follows quickly, so that the first weights do not stay in it.
            decay = min(recipe.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
            step += 1
            now = time.monotonic()
            recent = value.item() if recent == 0 else 0.98 * recent + 0.02 * value.item()
            rate = (step - first) * recipe.batch / (now - begin)
            bar.update(task, completed=step, status=f"loss {recent:.4f}  {rate:.0f} samples/s")
            if now - logged > 10 or step == recipe.steps:
                record = {"step": step, "loss": recent, "samples_per_s": round(rate, 1), "seconds": round(now - begin)}
                print(json.dumps(record), file=log, flush=True)
                logged = now
            if now - saved >= save_every:
                save()
                saved = time.monotonic()
    if step > first:
        save()
    return step >= recipe.steps


def _restore(
    file: Path,
    settings: dict[str, Any],
    parameters: dict[str, Parameter],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    tensors, about = read_tensors(file)
    if about["settings"] != settings:
        raise ValueError(f"{file} was made with {about['settings']}, not with {settings}: choose another --out")
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(tensors[f"model.{key}"])
            average[key].copy_(tensors[f"ema.{key}"])
            # The fused optimiser walks parameter and moments by address: they must share one memory format.
            state = {
                name: torch.empty_like(p).copy_(tensors[f"adam.{key}.{name}"]) for name in ("exp_avg", "exp_avg_sq")
            }
            optimizer.state[p] = {"step": tensors[f"adam.{key}.step"], **state}
    return about["step"]  # type: ignore[no-any-return]


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
