"""Which timesteps a request uses: the official DSD grid, the img2img mapping of diffusers, or a list as given."""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

from dsd_fast.diffusion.schedulers import fresh_scheduler
from dsd_fast.kernels.common.host import ordinary

# The official pipeline runs img2img's get_timesteps with 50 steps and strength 0.8 on the unspaced list of all
# timesteps: t_start = 50 - 40, counted in entries of that list and cut from both of its ends.
_OFFICIAL_MARGIN = 10


def official_timesteps(
    sampling_steps: int, num_train_timesteps: int = 1000, *, margin: int = _OFFICIAL_MARGIN
) -> list[int]:
    """The grid of the official DSD code for a requested number of steps, ascending.

    t = (S − 1) − i for i in range(margin, S − margin, ⌊S / sampling_steps⌋), S = num_train_timesteps. The margins and
    the rounding make the grid shorter than asked for some counts: 50 gives 49 timesteps, 200 gives 196, 1000 gives 980.
    Source: `sampled_timesteps` of eric-ai-lab/DSD (He et al., arXiv 2305.10722).

    Args:
        sampling_steps: 1 ≤ sampling_steps ≤ num_train_timesteps.
        num_train_timesteps: length of the noise schedule, more than two margins.
        margin: timesteps left out at either end, at least 0.

    Raises:
        ValueError: an argument outside its range.
    """
    total = _as_int("num_train_timesteps", num_train_timesteps)
    if _as_int("margin", margin) < 0:
        raise ValueError(f"margin is {margin}, expected at least 0")
    if total <= 2 * margin:
        raise ValueError(f"num_train_timesteps is {total}, expected more than {2 * margin}")
    steps = _as_int("sampling_steps", sampling_steps)
    if not 1 <= steps <= total:
        raise ValueError(f"sampling_steps is {steps}, expected 1 to {total}")
    return [total - 1 - i for i in range(margin, total - margin, total // steps)][::-1]


def img2img_timestep(scheduler: Any, t: int) -> int:
    """The timestep that the official feature extractors really use when `t` is asked for.

    They call `set_timesteps(S)` and take the first entry of img2img's `get_timesteps(S, t / S)`, S =
    num_train_timesteps. Asked for 50, that is 51 with SD 1.5's PNDM scheduler, 49 with SD 2.1's Euler scheduler (spaced
    "linspace"), and 50 with SDXL's. The rule has no answer for t = 0 (PNDM: 1, Euler: an empty list); here it means the
    clean latent: 0 is returned and no noise must be added.
    Source: Darkbblue/generic-diffusion-feature; StableDiffusionImg2ImgPipeline.get_timesteps.

    Args:
        scheduler: a diffusers scheduler, left as it is, or its config with "_class_name".
        t: 0 ≤ t < num_train_timesteps.

    Raises:
        ValueError: `t` outside that range, or a scheduler whose timesteps are not integers in that range.
    """
    total = int(fresh_scheduler(scheduler).config.num_train_timesteps)
    asked = _as_int("t", t)
    if not 0 <= asked < total:
        raise ValueError(f"t is {asked}, expected 0 to {total - 1}")
    if asked == 0:
        return 0
    fresh, start = started(scheduler, total, asked / total)
    used = float(fresh.timesteps[start])
    if not used.is_integer() or not 0 <= used < total:
        raise ValueError(
            f"scheduler {type(fresh).__name__} maps t = {asked} to {used}, expected an integer from 0 to {total - 1}"
        )
    return int(used)


def resolve_timesteps(spec: int | Sequence[int], num_train_timesteps: int = 1000) -> list[int]:
    """Timesteps from a specification: a count takes the official DSD grid, a sequence of integers is used as given.

    Args:
        spec: number of steps, or the timesteps in any order, repeats allowed; arrays and 1-D tensors count as
            sequences.
        num_train_timesteps: length of the noise schedule.

    Raises:
        ValueError: no timesteps, a timestep that is not an integer, or one outside 0 … num_train_timesteps − 1.
    """
    if isinstance(spec, SupportsIndex) and getattr(spec, "ndim", 0) == 0:
        return official_timesteps(_as_int("timesteps", spec), num_train_timesteps)
    if isinstance(spec, str | bytes) or not isinstance(spec, Iterable):
        raise ValueError(f"timesteps is {spec!r}, expected a count or a sequence of integers")
    values = [_as_int("timesteps", value) for value in spec]
    if not values:
        raise ValueError("timesteps is empty, expected at least one timestep")
    for value in values:
        if not 0 <= value < num_train_timesteps:
            raise ValueError(f"timesteps holds {value}, expected 0 to {num_train_timesteps - 1}")
    return values


@ordinary()
def started(scheduler: Any, steps: int, strength: float) -> tuple[Any, int]:
    """Set a fresh scheduler's timesteps, and find the index of the first one that img2img's `get_timesteps` takes.

    Args:
        scheduler: a diffusers scheduler, left as it is, or its config with "_class_name".
        steps: number of inference steps over the whole schedule.
        strength: share of them that is taken, 0 to 1.

    Raises:
        ValueError: an argument outside its range, a strength too small for any step, or more steps than there are
            timesteps.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}, expected an integer of at least 1")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}, expected 0 to 1")
    # The rounding is part of diffusers' rule: 1000 * (t / 1000) can fall below t.
    taken = min(int(steps * strength), steps)
    if taken < 1:
        raise ValueError(f"strength is {strength}, too small for any of {steps} steps")
    fresh = fresh_scheduler(scheduler)
    try:
        fresh.set_timesteps(steps)
    except ValueError as error:
        # LCM and its kin know the few steps that they were distilled for.
        raise ValueError(f"steps is {steps}, which {type(fresh).__name__} refuses: {error}") from error
    start = (steps - taken) * fresh.order
    times = fresh.timesteps.tolist()
    # Spaced by less than one, they are all the same, or one too high.
    if (steps > 1 and len(set(times)) == 1) or times[start] >= fresh.config.get("num_train_timesteps", math.inf):
        raise ValueError(f"steps is {steps}, more than {type(fresh).__name__} has timesteps for")
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(start)
    return fresh, start


def _as_int(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected an integer") from None
