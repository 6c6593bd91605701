"""A diffusers scheduler's own steps, and the samplers that they make: img2img, text to image, guidance.

Functions of tensors and of a `Predict`; no network is known. Latents have the form z_t = √ᾱ_t z₀ + √(1 − ᾱ_t) ε, which
the UNet is given, wherever a function takes, yields or returns them. Some schedulers (Euler and its kin) step in
another form, z_t / √ᾱ_t = z₀ + σ_t ε; that form never leaves this module.

Between the steps latents are held in float32 at least: a step of one timestep changes less than half precision can
hold. Gradients flow, so wrap calls in `torch.no_grad()` where none are wanted.
"""

import inspect
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsd_fast.diffusion.ddim import CLEAN, Predict, working_dtype
from dsd_fast.diffusion.noise import RowNoise
from dsd_fast.diffusion.schedule import NoiseSchedule, check_noise
from dsd_fast.diffusion.schedulers import check_draws, draws_noise
from dsd_fast.diffusion.timesteps import started
from dsd_fast.kernels.common.host import own_defaults, own_types
from dsd_fast.kernels.common.transfer import upload

_SHORT_DENOISING = 50


def scheduler_timesteps(scheduler: Any, steps: int, strength: float = 1.0) -> list[float]:
    """The timesteps that a diffusers img2img pipeline visits, in its order: `set_timesteps`, then `get_timesteps`.

    Whole ones are ints. PNDM visits its second one twice when it starts from the top.

    Args:
        scheduler: a diffusers scheduler, left as it is, or its config with "_class_name".
        steps: number of inference steps over the whole schedule.
        strength: share of them that is taken, the last int(steps · strength), 0 to 1. 1 is sampling from noise.

    Raises:
        ValueError: an argument outside its range, or a strength too small for any step.
    """
    fresh, start = started(scheduler, steps, strength)
    return [_time(t) for t in fresh.timesteps[start:]]


def official_denoising(denoise_from: int, t: int, num_train_timesteps: int = 1000) -> tuple[int, float]:
    """(steps, strength) with which the official extractors denoise from one timestep to another before they extract.

    All timesteps of the schedule are visited when the two are at most 50 apart, else every tenth. From 60 to 50 that
    makes 11 updates with PNDM and 9 with Euler. For the long way the official code divides by 100 instead of the number
    of timesteps, hence starts at the top whatever was asked (strength 1); that is put right here.
    Source: `extract` of Darkbblue/generic-diffusion-feature.

    Raises:
        ValueError: not 0 < t < denoise_from < num_train_timesteps.
    """
    if not 0 < t < denoise_from < num_train_timesteps:
        raise ValueError(
            f"denoise_from is {denoise_from} and t is {t}, expected 0 < t < denoise_from < {num_train_timesteps}"
        )
    short = denoise_from - t <= _SHORT_DENOISING
    return num_train_timesteps if short else max(1, num_train_timesteps // 10), denoise_from / num_train_timesteps


def scheduler_noised(
    scheduler: Any, latents: Tensor, noise: Tensor, steps: int, strength: float = 1.0
) -> tuple[float, Tensor]:
    """Where `scheduler_steps` begins: the first of its timesteps, and the latents noised to it by the scheduler's rule.

    Some schedulers place timesteps between two of the schedule, with a noise level between theirs.

    Args:
        scheduler, steps, strength: as for `scheduler_steps`.
        latents: z₀, (B, C, h, w).
        noise: ε, a shape that broadcasts to that of `latents`.

    Returns:
        (t, z_t), z_t (B, C, h, w) as the UNet sees it, in the dtype of `latents`.

    Raises:
        ValueError: arguments as for `scheduler_timesteps`, or a noise that does not fit.
    """
    fresh, start = started(scheduler, steps, strength)
    first = fresh.timesteps[start]
    state = _noised(fresh, start, latents, noise)
    return _time(first), fresh.scale_model_input(state, first).to(latents.dtype)


def scheduler_steps(
    scheduler: Any,
    predict: Predict,
    latents: Tensor,
    steps: int,
    strength: float = 1.0,
    *,
    until: float | None = None,
    draws: RowNoise | None = None,
    eta: float = 0.0,
) -> Iterator[tuple[float, Tensor]]:
    """A diffusers scheduler's own steps over `scheduler_timesteps(scheduler, steps, strength)`.

    Latents are given and yielded as the UNet sees them (see the module), whatever form the scheduler steps in. PNDM's
    second update repeats its first one with a better slope and gains no timestep. From the top the second timestep
    comes twice for that; from below it does not, so that latents lag one step behind the timestep they are yielded
    with. Stock pipelines do the same.

    Args:
        scheduler: left as it is; a fresh one is made from its config. A config with "_class_name" will do.
        predict: called at every timestep yielded but the last.
        latents: z at the first of those timesteps, (B, C, h, w).
        until: stop at the last of those timesteps that is not below this one; None goes on to the clean latent.
        draws: the rows' noise, of schedulers that add some at each step; others leave it alone.
        eta: of DDIM, 0 to 1: how much noise it adds.

    Yields:
        (t, z_t) at every timestep, the first and the last included; the clean latent comes with −1. z_t (B, C, h, w)
        in the dtype of `latents`.

    Raises:
        ValueError: arguments as for `scheduler_timesteps`, `until` above the first timestep, or noise that the
            scheduler adds without `draws`, for a whole batch at once, or not at all where `eta` asks for it.
    """
    fresh, start = started(scheduler, steps, strength)
    first = fresh.timesteps[start]
    if until is not None and until > float(first):
        raise ValueError(f"until is {until}, expected at most {float(first):g}, the first timestep")
    real = _held(latents, draws)
    # What the scheduler multiplies its own form by to make the UNet's input.
    factor = fresh.scale_model_input(torch.ones(1, dtype=real, device=latents.device), first)
    options = _options(fresh, draws, eta)
    return _run(fresh, start, predict, latents.to(real) / factor, latents.dtype, until, draws, options)


def img2img(
    scheduler: Any,
    predict: Predict,
    latents: Tensor,
    noise: Tensor,
    *,
    strength: float,
    steps: int,
    draws: RowNoise | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Noises latents and samples back to clean ones: the loop of diffusers' img2img pipelines.

    Meng et al. 2022, "SDEdit". Guidance is the business of `predict`: see `guided`.

    Args:
        scheduler: a diffusers scheduler, left as it is, or its config with "_class_name".
        latents: z₀ of the images, (B, C, h, w).
        noise: ε, a shape that broadcasts to that of `latents`.
        strength: share of the steps that is taken, above 0 and at most 1.
        steps: number of inference steps over the whole schedule.
        draws, eta: as for `scheduler_steps`.

    Returns:
        z₀ of the results, (B, C, h, w) in the dtype of `latents`.

    Raises:
        ValueError: arguments as for `scheduler_steps`, or a noise that does not fit.
    """
    fresh, start = started(scheduler, steps, strength)
    options = _options(fresh, draws, eta)
    state = _noised(fresh, start, latents, noise).to(_held(latents, draws))
    return _last(_run(fresh, start, predict, state, latents.dtype, None, draws, options))


def sample(
    scheduler: Any,
    predict: Predict,
    noise: Tensor,
    *,
    steps: int,
    draws: RowNoise | None = None,
    eta: float = 0.0,
) -> Tensor:
    """Samples clean latents from noise: the loop of diffusers' text-to-image pipelines.

    Args:
        scheduler: a diffusers scheduler, left as it is, or its config with "_class_name".
        noise: ε of unit variance, (B, C, h, w).
        steps: number of inference steps.
        draws, eta: as for `scheduler_steps`.

    Returns:
        z₀, (B, C, h, w) in the dtype of `noise`.

    Raises:
        ValueError: arguments as for `scheduler_steps`.
    """
    fresh, start = started(scheduler, steps, 1.0)
    options = _options(fresh, draws, eta)
    state = noise.to(_held(noise, draws)) * fresh.init_noise_sigma
    return _last(_run(fresh, start, predict, state, noise.dtype, None, draws, options))


def guided(predict: Predict, scale: float | Sequence[float], rescale: float | Sequence[float] = 0.0) -> Predict:
    """Classifier-free guidance, u + scale · (c − u).

    Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6 with scale = 1 + w. Rescaled as in Lin et al. 2024,
    "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4: φ of the result has the conditional
    output's standard deviation over (C, h, w); diffusers' `rescale_noise_cfg`.

    Args:
        predict: given the B latents once; answers with the unconditional outputs of the rows whose scale is not 1,
            then with the conditional outputs of all B, as diffusers orders them.
        scale: one for all rows, or one each; 1 is the conditional output alone.
        rescale: φ, 0 to 1, one for all rows, or one each.

    Returns:
        A prediction of B rows in float32 at least: the scale would magnify what a rounded difference has lost.
        `predict` itself where all scales are 1.
    """
    scales, shares = (torch.as_tensor(each, dtype=torch.float64, device="cpu") for each in (scale, rescale))
    rows = (scales != 1).nonzero().flatten() if scales.ndim else None
    if not (scales != 1).any():
        return predict
    # In a row that is not guided there is nothing to rescale.
    shares = torch.where(scales != 1, shares, 0.0)
    rescaled, mixed = bool((shares != 0).any()), rows is not None and len(rows) < len(scales)
    placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor | float, Tensor | float, Tensor | None]] = {}

    def predict_guided(latents: Tensor, t: float) -> Tensor:
        outputs = predict(latents, t)
        outputs = outputs.to(working_dtype(outputs))
        key = (outputs.device, outputs.dtype)
        if key not in placed:
            wide = (-1,) + (1,) * (outputs.ndim - 1)
            s, phi = (
                upload(each, *key).view(wide) if each.ndim else float(each) for each in (scales, shares)
            )  # (B, 1, 1, 1)
            placed[key] = s, phi, upload(rows, outputs.device) if mixed and rows is not None else None
        s, phi, own = placed[key]
        count = len(latents)
        unconditional, conditional = outputs[: len(outputs) - count], outputs[len(outputs) - count :]
        if own is not None:
            unconditional = conditional.index_copy(0, own, unconditional)
        result = unconditional + s * (conditional - unconditional)
        if rescaled:
            over = tuple(range(1, result.ndim))
            factor = conditional.std(over, keepdim=True) / result.std(over, keepdim=True)
            result = phi * (result * factor) + (1 - phi) * result
        return result

    return predict_guided


def within(schedule: NoiseSchedule, interval: tuple[float, float | None], inside: Predict, outside: Predict) -> Predict:
    """Predict by one function at some noise levels and by another elsewhere.

    Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in
    Diffusion Models".

    Args:
        interval: (low, high): `inside` is called where low < σ ≤ high, σ = √((1 − ᾱ) / ᾱ); a high of None is no bound.
    """
    low, high = interval[0], math.inf if interval[1] is None else interval[1]

    def predict(latents: Tensor, t: float) -> Tensor:
        return (inside if low < schedule.sigma(t) <= high else outside)(latents, t)

    return predict


def last_calls(predict: Predict, calls: int, last: int) -> Predict:
    """Turn gradients off for all calls of one walk but the last ones.

    The gradient of what comes out then goes through the last steps alone, as in Schwartz et al. 2023, "Discriminative
    Class Tokens for Text-to-Image Diffusion Models", whatever the scheduler makes of the outputs.

    Args:
        predict: differentiable while torch's gradients are on, as those of ``engine.predict(…, gradients=last)`` are.
        calls: that the walk makes, ``len(scheduler_timesteps(…))`` of :func:`sample` and :func:`img2img`.
        last: how many of them gradients go through, 1 to ``calls``.

    Returns:
        A prediction for one walk.

    Raises:
        ValueError: another number of last calls; at a call, one more than ``calls``.
    """
    if not 1 <= last <= calls:
        raise ValueError(f"last: got {last} of {calls} calls, expected 1 to {calls}")
    made = 0

    def predict_last(latents: Tensor, t: float) -> Tensor:
        nonlocal made
        made += 1
        if made > calls:
            raise ValueError(f"calls: got {calls} for a walk that makes more, expected all of its calls")
        with torch.set_grad_enabled(torch.is_grad_enabled() and made > calls - last):
            return predict(latents, t)

    return predict_last


def guidance_embedding(scale: float | Sequence[float] | Tensor, width: int) -> Tensor:
    """Make the embedding of guidance scales that a network distilled with them reads (LCM), for `Plan.run`.

    Sines, then cosines, of 1000 · w at width // 2 frequencies, w = scale − 1, and a zero where the width is odd. Luo et
    al. 2023, "Latent Consistency Models", section 4.2; diffusers' `get_guidance_scale_embedding` of the same w, in the
    order in which it computes it, because float32 shows at these angles.

    Args:
        scale: diffusers' guidance_scale, one or (n,).
        width: of the embedding, the network's time_cond_proj_dim.

    Returns:
        (n, width) float32 on the CPU, n = 1 for one scale.

    Raises:
        ValueError: a width below 4.
    """
    if width < 4:
        raise ValueError(f"width is {width}, expected at least 4")
    w = (torch.as_tensor(scale, dtype=torch.float64, device="cpu").reshape(-1) - 1.0).float()
    half = width // 2
    step = torch.log(torch.tensor(10000.0, dtype=torch.float32, device="cpu")) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device="cpu") * -step)
    angles = (w * 1000.0)[:, None] * frequencies  # (n, width // 2)
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def _options(scheduler: Any, draws: RowNoise | None, eta: float) -> dict[str, Any]:
    """What else a prepared scheduler's steps are given; "generator" where they draw noise.

    Raises:
        ValueError: noise that has no place, or that nobody gave.
    """
    check_draws(scheduler, eta)
    options: dict[str, Any] = {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
    if draws_noise(scheduler, eta):
        if draws is None:
            raise ValueError(f"draws: got None, needed by {type(scheduler).__name__}, which adds noise at each step")
        options["generator"] = None
    return options


def _held(latents: Tensor, draws: RowNoise | None) -> torch.dtype:
    """The type of latents between steps."""
    return working_dtype(latents) if draws is None or draws.held is None else draws.held


def _run(
    scheduler: Any,
    start: int,
    predict: Predict,
    state: Tensor,
    dtype: torch.dtype,
    until: float | None,
    draws: RowNoise | None,
    options: dict[str, Any],
) -> Iterator[tuple[float, Tensor]]:
    """Steps a prepared scheduler; `state` has the scheduler's own form."""
    times = [t for t in scheduler.timesteps[start:] if until is None or float(t) >= until]
    for number, t in enumerate(times):
        with own_defaults():
            shown = scheduler.scale_model_input(state, t).to(dtype)
        yield _time(t), shown
        if until is None or number + 1 < len(times):
            output = predict(shown, _time(t)).to(state.dtype)
            if draws is not None and "generator" in options:
                options["generator"] = draws.step(number)
            # Some solve systems that they make in the default type, and under autocast would multiply in halves.
            with own_defaults(), own_types(state.device):
                state = scheduler.step(output, t, state, return_dict=False, **options)[0].to(state.dtype)
    if until is None:
        yield CLEAN, state.to(dtype)


def _noised(scheduler: Any, start: int, latents: Tensor, noise: Tensor) -> Tensor:
    """z₀ noised to a prepared scheduler's first timestep, in the scheduler's own form.

    Raises:
        ValueError: a noise that does not fit.
    """
    check_noise(noise, latents)
    real = working_dtype(latents)
    first = scheduler.timesteps[start : start + 1]
    # Its rule, signal · z₀ + sigma · ε, is asked for on the host: on a device it would wait there for its own numbers.
    one, none = torch.ones(1, dtype=real, device="cpu"), torch.zeros(1, dtype=real, device="cpu")
    with own_defaults():
        factors = (scheduler.add_noise(one, none, first), scheduler.add_noise(none, one, first))
    signal, sigma = upload(torch.stack(factors), latents.device)  # (2, 1)
    state: Tensor = signal * latents.to(real) + sigma * upload(noise, latents.device, real)
    return state


def _last(trajectory: Iterator[tuple[float, Tensor]]) -> Tensor:
    ((_, result),) = deque(trajectory, maxlen=1)
    return result


def _time(t: Tensor) -> float:
    value = float(t)
    return int(value) if value.is_integer() else value
