"""The latents that the network sees at each timestep: noised, denoised from above, or inverted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsd_fast.diffusion import (
    denoise,
    img2img_timestep,
    inversion_grid,
    invert,
    official_denoising,
    scheduler_noised,
    scheduler_steps,
    scheduler_timesteps,
)
from dsd_fast.engine import Engine, noised
from dsd_fast.features.inputs import Inputs, predictor
from dsd_fast.features.technique import Technique
from dsd_fast.models import Model


def used_timesteps(model: Model, timesteps: Sequence[int], official: bool) -> list[int]:
    """The timesteps that the network is told: those asked for, or what the official extractors make of them.

    Raises:
        ValueError: one outside the schedule.
    """
    for t in timesteps:
        if isinstance(t, bool) or not isinstance(t, int | np.integer):
            raise ValueError(f"timesteps holds {t!r}, expected integers")
        if not 0 <= t < model.schedule.num_train_timesteps:
            raise ValueError(f"timesteps holds {t}, expected 0 to {model.schedule.num_train_timesteps - 1}")
    scheduler = model.new_scheduler()
    return [img2img_timestep(scheduler, t) if official else int(t) for t in timesteps]


def told_timesteps(model: Model, technique: Technique, timesteps: Sequence[int], official: bool) -> list[float]:
    """The timesteps that the network is told under a technique: :func:`used_timesteps`, or where a walk ends.

    Raises:
        ValueError: a timestep outside the schedule, or one that the technique's way does not pass.
    """
    used, top = used_timesteps(model, timesteps, official), technique.denoise_from
    total = model.schedule.num_train_timesteps
    if technique.inversion and not official and model.schedule.prediction_type == "sample":
        raise ValueError("inversion: a model that predicts z₀ says nothing of the noise of a latent without any")
    if top is None:
        return list(used)
    if not all(t < top for t in timesteps) or not top < total:
        raise ValueError(
            f"denoise_from: got {top}, expected above the timesteps {list(timesteps)} and below {total}, the length of "
            "the schedule"
        )
    if not official:
        return list(used)
    return [0 if t == 0 else _last_of_walk(model, top, t) for t in timesteps]


@dataclass(frozen=True)
class Way:
    """From some images to their latents at the timesteps, under one technique.

    Attributes:
        engine: under the technique's adapters and ControlNets.
        technique: says how latents are made.
        asked, used: see :func:`used_timesteps`; :func:`told_timesteps` has accepted them.
        official: whether the official extractors' steps are taken.
    """

    engine: Engine
    technique: Technique
    asked: Sequence[int]
    used: Sequence[int]
    official: bool

    def latents(self, inputs: Inputs, prompts: Sequence[str]) -> tuple[Tensor, Sequence[float]]:
        """Make (n, S, D, C, h, w) latents at the timesteps, and tell the timesteps that they really stand at.

        Args:
            prompts: one for each of the n images.
        """
        if self.technique.inversion:
            return self._inverted(inputs, prompts), self.used
        if self.technique.denoise_from is None:
            return self._noised(inputs, self.used), self.used
        result = self._noised(inputs, [0] * len(self.used))
        if self.official:
            return self._denoised_officially(inputs, prompts, result)
        return self._denoised(inputs, prompts, result), self.used

    def _noised(self, inputs: Inputs, timesteps: Sequence[int]) -> Tensor:
        return noised(self.engine.model.schedule, inputs.latents, inputs.noise, timesteps, clean_at_zero=True)

    def _inverted(self, inputs: Inputs, prompts: Sequence[str]) -> Tensor:
        model = self.engine.model
        grid = inversion_grid(model.new_scheduler()) if self.official else None
        # The official walk leaves the ControlNets out.
        predict = predictor(self.engine, inputs, prompts, controlled=not self.official)
        walk = invert(
            model.schedule, predict, inputs.latents, sorted(set(self.used)), grid=grid, exact=not self.official
        )
        reached = dict(walk)
        return torch.stack([reached[t] for t in self.used], dim=1)[:, :, None]  # (n, S, 1, C, h, w)

    def _denoised(self, inputs: Inputs, prompts: Sequence[str], result: Tensor) -> Tensor:
        """Fills ``result`` by walks down; t = 0 stays the clean latent."""
        model, top = self.engine.model, self.technique.denoise_from
        assert top is not None
        low = sorted({t for t in self.used if t}, reverse=True)
        start = self._noised(inputs, [top])[:, 0]  # (n, D, C, h, w)
        draws = start.shape[1]
        predict = predictor(self.engine, inputs, prompts, repeats=draws)
        for way, wanted in _ways(top, low, self.technique.denoise_steps):
            for t, z in denoise(model.schedule, predict, start.flatten(0, 1), way):
                for position in (number for number, used in enumerate(self.used) if used == t and t in wanted):
                    result[:, position] = z.view(-1, draws, *z.shape[1:])
        return result

    def _denoised_officially(
        self, inputs: Inputs, prompts: Sequence[str], result: Tensor
    ) -> tuple[Tensor, Sequence[float]]:
        """By the scheduler's own steps, a walk for each timestep, as the official extractors do one at a time."""
        model, top = self.engine.model, self.technique.denoise_from
        stood: list[float] = []
        assert top is not None
        images, _, draws = result.shape[:3]
        clean = inputs.latents.repeat_interleave(draws, 0)  # (n·D, C, h, w)
        epsilon = inputs.noise[:, 0].expand(images, -1, -1, -1, -1).flatten(0, 1)
        predict = predictor(self.engine, inputs, prompts, repeats=draws)
        for position, t in enumerate(self.asked):
            if t == 0:
                stood.append(0)
                continue
            steps, strength = official_denoising(top, t, model.schedule.num_train_timesteps)
            _, start = scheduler_noised(model.new_scheduler(), clean, epsilon, steps, strength)
            *_, (last, z) = scheduler_steps(
                model.new_scheduler(), predict, start, steps, strength, until=t, draws=inputs.step_noise()
            )
            result[:, position] = z.view(images, draws, *z.shape[1:])
            stood.append(last)
        return result, stood


def _ways(top: int, low: Sequence[int], steps: int | None) -> list[tuple[list[int], Sequence[int]]]:
    """The timesteps of each walk, and those that are wanted of it.

    One walk, timestep by timestep, through all; or one in few steps to each alone. What a feature is then does not
    depend on the other timesteps.
    """
    if steps is None:
        return [(list(range(top, low[-1] - 1, -1)), low)] if low else []
    ways = [{int(each) for each in np.linspace(top, t, steps + 1).round()} for t in low]
    return [(sorted(way, reverse=True), [t]) for way, t in zip(ways, low, strict=True)]


def _last_of_walk(model: Model, top: int, t: int) -> float:
    """Where the official walk from one timestep to another ends."""
    steps, strength = official_denoising(top, t, model.schedule.num_train_timesteps)
    return [each for each in scheduler_timesteps(model.new_scheduler(), steps, strength) if each >= t][-1]
