"""Trajectories of latents by deterministic DDIM steps: through exact timesteps, and up again from a clean latent.

Functions of tensors and of a `Predict`; no network is known. Between the steps latents are held in float32 at least: a
step of one timestep changes less than half precision can hold. Gradients flow, so wrap calls in `torch.no_grad()` where
none are wanted.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsd_fast.diffusion.schedule import NoiseSchedule
from dsd_fast.kernels.common.host import ordinary

Predict = Callable[[Tensor, float], Tensor]
"""The UNet's input (B, C, h, w) and the timestep, an int save where a scheduler places one between two, to the model's
output (B, C, h, w) as diffusers gives it: ε, v or z₀."""

CLEAN = -1
"""The timestep after the last step: the latent without noise, ᾱ = 1. Timestep 0 of a schedule still has a little."""

_INVERSION_STEPS = 100


def ddim_step(schedule: NoiseSchedule, output: Tensor, latents: Tensor, t: int, to: int) -> Tensor:
    """The deterministic DDIM update from timestep t to any other: √ᾱ_to ẑ₀ + √(1 − ᾱ_to) ε̂.

    Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12 with σ = 0. Upwards (to > t) it is the inversion
    z ← (z − √(1 − ᾱ_t) ε̂) √(ᾱ_to / ᾱ_t) + √(1 − ᾱ_to) ε̂ (section 4.3). ẑ₀ and ε̂ are read from ε, v and z₀ predictions
    alike, with the noise level of `latents`.

    Args:
        output: the model's output, (B, C, h, w).
        latents: z_t, (B, C, h, w).
        t: noise level of `latents`: a timestep of the schedule, or −1 for latents without noise.
        to: noise level of the result, likewise. Timestep 0 is the schedule's own, with its little noise.

    Returns:
        (B, C, h, w) in the dtype of `latents`, computed in float32 at least.

    Raises:
        ValueError: a timestep outside the schedule, shapes that differ, or a level at which the prediction does not
            determine ẑ₀ and ε̂ (an ε prediction where ᾱ = 0, a z₀ prediction where ᾱ = 1).
    """
    for name, value in (("t", t), ("to", to)):
        if not CLEAN <= value < schedule.num_train_timesteps:
            raise ValueError(f"{name} is {value}, expected -1 to {schedule.num_train_timesteps - 1}")
    if output.shape != latents.shape:
        raise ValueError(f"output has shape {tuple(output.shape)}, expected {tuple(latents.shape)}")
    real = working_dtype(latents)
    given, z = output.to(real), latents.to(real)
    if t == CLEAN:
        if schedule.prediction_type == "sample":
            raise ValueError("t is -1: a prediction of type 'sample' says nothing of the noise of a latent without any")
        original, epsilon = z, given
    else:
        original, epsilon = schedule.to_original(given, z, t), schedule.to_epsilon(given, z, t)
    if to == CLEAN:
        return original.to(latents.dtype)
    return schedule.add_noise(original, epsilon, to).to(latents.dtype)


def denoise(
    schedule: NoiseSchedule, predict: Predict, latents: Tensor, timesteps: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """DDIM from the first of the timesteps through each of them, exactly; one prediction between neighbours.

    Args:
        predict: called at every timestep but the last, with all rows.
        latents: z at the first timestep, (B, C, h, w).
        timesteps: strictly descending, each in the schedule. 0 stands for the clean latent here.

    Yields:
        (t, z_t) at every timestep, the first (the given latents) and the last included; z_t (B, C, h, w) in the dtype
        of `latents`.

    Raises:
        ValueError: timesteps empty, not descending or outside the schedule.
    """
    steps = _checked(timesteps, schedule.num_train_timesteps)
    if any(above <= below for above, below in itertools.pairwise(steps)):
        raise ValueError(f"timesteps is {steps}, expected strictly descending")
    return _denoise(schedule, predict, latents, steps)


def _denoise(
    schedule: NoiseSchedule, predict: Predict, latents: Tensor, steps: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    state = latents.to(working_dtype(latents))
    for number, t in enumerate(steps):
        shown = state.to(latents.dtype)
        yield t, shown
        if number + 1 < len(steps):
            state = ddim_step(schedule, predict(shown, t), state, t, steps[number + 1] or CLEAN)


@ordinary()
def inversion_grid(scheduler: Any, steps: int = _INVERSION_STEPS) -> list[int]:
    """The ascending timesteps of the official DDIM inversion under a model's scheduler.

    Those of a DDIMScheduler made from its config: 1, 11, 21 … for SD 1.5, 0, 10, 20 … for SD 2.1's "linspace".

    Args:
        scheduler: a diffusers scheduler, left as it is, or its config.
    """
    import diffusers

    config = scheduler if isinstance(scheduler, dict) else scheduler.config
    ddim = diffusers.DDIMScheduler.from_config(dict(config))
    ddim.set_timesteps(steps)
    return [int(t) for t in reversed(ddim.timesteps)]


def invert(
    schedule: NoiseSchedule,
    predict: Predict,
    latents: Tensor,
    until: Sequence[int],
    *,
    grid: Sequence[int] | None = None,
    exact: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """DDIM inversion: the noise that the model itself sees in an image, instead of a random one.

    One walk up a fixed grid serves every timestep asked for. From one grid timestep to the next the step is
    `ddim_step`, the output predicted at the next timestep with the latents of the current one; as in the official code,
    a latent at grid timestep g counts as one of max(0, g − S / steps), and the walk starts at the second grid timestep.
    Source: `ddim_inversion` of Darkbblue/generic-diffusion-feature (which takes any output for ε; here v and z₀
    predictions are converted).

    Args:
        predict: called once per grid timestep passed, with all rows.
        latents: z₀, (B, C, h, w).
        until: timesteps asked for, ascending; repeats allowed. 0 is z₀ itself.
        grid: ascending timesteps; by default 1, 11, 21 …, 100 of them, as `inversion_grid` gives for SD 1.5.
        exact: False: each result stands at the first grid timestep not below the one asked for (the last, if there is
            none), as in the official code. True: the walk starts from ᾱ = 1 at z₀, and each result is a side step from
            the last grid timestep below to exactly the one asked for; results do not depend on what else is asked for.

    Yields:
        (t, z) for each t of `until`, z (B, C, h, w) in the dtype of `latents`.

    Raises:
        ValueError: `until` or `grid` empty, not ascending or outside the schedule; or `exact` for a model that
            predicts z₀, which tells nothing of the noise where there is none.
    """
    total = schedule.num_train_timesteps
    asked = _checked(until, total, "until")
    if asked != sorted(asked):
        raise ValueError(f"until is {asked}, expected ascending")
    if grid is None:
        points = list(range(1 % total, total, max(1, total // _INVERSION_STEPS)))
    else:
        points = _checked(grid, total, "grid")
    if len(points) < 2 or points != sorted(set(points)):
        raise ValueError(f"grid is {points}, expected at least two timesteps, strictly ascending")
    if exact and schedule.prediction_type == "sample" and asked[-1] > 0:
        raise ValueError("exact is True, expected False for a model that predicts z₀")
    return _invert(schedule, predict, latents, asked, points, exact)


def _invert(
    schedule: NoiseSchedule, predict: Predict, latents: Tensor, asked: Sequence[int], grid: Sequence[int], exact: bool
) -> Iterator[tuple[int, Tensor]]:
    stride = schedule.num_train_timesteps // len(grid)
    state, level, ahead = latents.to(working_dtype(latents)), CLEAN if exact else 0, list(grid[1:])
    for t in asked:
        while ahead and (ahead[0] <= t if exact else level < t):
            following = ahead.pop(0)
            output = predict(state.to(latents.dtype), following)
            start = level if exact else max(0, following - stride)
            state, level = ddim_step(schedule, output, state, start, following), following
        result = state
        if exact and t not in (0, level):
            result = ddim_step(schedule, predict(state.to(latents.dtype), t), state, level, t)
        yield t, result.to(latents.dtype)


def working_dtype(latents: Tensor) -> torch.dtype:
    """The dtype that latents are held in between steps."""
    return torch.promote_types(latents.dtype, torch.float32)


def _checked(timesteps: Sequence[int], total: int, name: str = "timesteps") -> list[int]:
    values = list(timesteps)
    if not values:
        raise ValueError(f"{name} is empty, expected at least one timestep")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < total:
            raise ValueError(f"{name} holds {value!r}, expected integers from 0 to {total - 1}")
    return values
