"""Settings of a generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsd_fast.diffusion import SAMPLERS
from dsd_fast.diffusion.noise import NOISES
from dsd_fast.engine.settings import (
    Fields,
    above,
    are_names,
    check_fields,
    integer,
    is_scheduler,
    is_size,
    is_text,
    number,
    or_none,
)


@dataclass(frozen=True)
class GenerateConfig:
    """How images are generated; what a row says itself counts before it.

    Attributes:
        steps: of the scheduler; a scheduler of a higher order may call the network more often.
        guidance: classifier-free guidance's scale; up to 1 there is none, and no unconditional row.
        guidance_rescale: φ of Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", 0 to 1.
        negative_prompt: in the place of the absent prompt.
        strength: of images that are started from, above 0 to 1.
        image_size: (height, width) in pixels; None: the model's own.
        clip_skip: layers of the text encoder left out at its end, as diffusers counts them: 1 takes the state before
            the last; None takes what the model's pipeline takes. Negative prompts are encoded without it, as there.
        scheduler: one of :data:`dsd_fast.diffusion.schedulers.SAMPLERS`, or a diffusers scheduler; None: the model's.
        eta: of DDIM, 0 to 1.
        noise: "dsd_fast": by (seed, draw), the start's draw 0 and each step's its own; "diffusers": of one
            ``torch.Generator("cpu").manual_seed(seed)`` a row, what a stock pipeline draws of it; a seed's lower
            32 bits count.
        guidance_interval: (low, high), the noise levels σ = √((1 − ᾱ) / ᾱ) with low < σ ≤ high inside which guidance is
            applied; elsewhere the conditional row runs alone. A high of None is no bound. Kynkäänniemi et al. 2024,
            "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models".
            None: everywhere.
        cache_interval: the whole network runs at every so many steps, and between them its shallow steps alone, on the
            deep activations of the last whole run. Ma et al. 2023, "DeepCache". 1: at every step.
        cache_branch_id: how many of the last skip connections beside the last one the shallow steps have, as in
            DeepCache.
        adapter: names of the adapters active in the networks, () for none; None leaves the model as it stands.
        memory_budget: bytes, see :meth:`dsd_fast.unet.plan.Plan.stream`.

    Raises:
        ValueError: a value outside its range, by name.
    """

    steps: int = 50
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    negative_prompt: str | None = None
    strength: float = 0.8
    image_size: tuple[int, int] | None = None
    clip_skip: int | None = None
    scheduler: str | Any | None = None
    eta: float = 0.0
    noise: str = "dsd_fast"
    guidance_interval: tuple[float, float | None] | None = None
    cache_interval: int = 1
    cache_branch_id: int = 0
    adapter: str | tuple[str, ...] | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, _FIELDS)


def _is_interval(x: object) -> bool:
    if not isinstance(x, tuple) or len(x) != 2 or not number(0)(x[0]):
        return False
    return x[1] is None or (number(0)(x[1]) and bool(x[0] < x[1]))


_FIELDS: Fields = {
    "steps": (integer(1), "an integer of at least 1"),
    "guidance": (number(0, 1e6), "a finite number of at least 0"),
    "guidance_rescale": (number(0, 1), "a number from 0 to 1"),
    "negative_prompt": (or_none(is_text), "a str or None"),
    "strength": (above(0, 1), "a number above 0 and at most 1"),
    "image_size": (or_none(is_size), "(height, width) in pixels, or None"),
    "clip_skip": (or_none(integer(0)), "an integer of at least 0, or None"),
    "scheduler": (or_none(is_scheduler), f"one of {', '.join(SAMPLERS)}, a diffusers scheduler, or None"),
    "eta": (number(0, 1), "a number from 0 to 1"),
    "noise": (lambda x: x in NOISES, f"one of {', '.join(NOISES)}"),
    "guidance_interval": (or_none(_is_interval), "(low, high) with 0 <= low < high, or high None, or None"),
    "cache_interval": (integer(1), "an integer of at least 1"),
    "cache_branch_id": (integer(0), "an integer of at least 0"),
    "adapter": (or_none(are_names), "a name, a tuple of names, or None"),
    "memory_budget": (or_none(integer(1)), "a number of bytes, or None"),
}
