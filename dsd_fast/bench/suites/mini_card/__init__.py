"""The mini model's card: what it can do, on data that it has never seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsd_fast.bench.case import Context, Figure, Group, Quality, Suite

__all__ = ["N", "suite"]

N = 1000
"""Evaluation scenes a figure; digits: all 360."""

_GROUPS = {"new scenes": False, "held-out pairs": True}


def _slug(group: str) -> str:
    return group.replace(" ", "-")


def _model(context: Context) -> Any:
    from dsd_fast.models import load

    return context.shared("mini", lambda: load("mini", device=context.device, local_files_only=True))


def _judge(context: Context) -> Any:
    from dsd_fast.bench.suites.mini_card.judge import judge

    model = _model(context)
    return context.shared("judge", lambda: judge(model.vae).to(model.device))


def _scenes(group: str, steps: int, floor: float | None) -> Quality:
    def measure(context: Context) -> Sequence[Figure]:
        from dsd_fast.bench.suites.mini_card.captions import scenes

        floors = {} if floor is None else {"3-way": floor}
        return scenes(_model(context), steps, N, group, _GROUPS[group], floors)

    return Quality(f"captions/{_slug(group)}/{steps}", "captions", measure)


def _digits(steps: int, floor: float | None) -> Quality:
    def measure(context: Context) -> Sequence[Figure]:
        from dsd_fast.bench.suites.mini_card.captions import digits

        return digits(_model(context), steps, floor=floor)

    return Quality(f"captions/digits/{steps}", "captions", measure)


def _one_object(group: str, floor: float) -> Quality:
    def measure(context: Context) -> Sequence[Figure]:
        from dsd_fast.bench.suites.mini_card.pictures import one_object

        return one_object(_model(context), _judge(context), N, f"one object, {group}", _GROUPS[group], floor)

    return Quality(f"pictures/one-object/{_slug(group)}", "pictures", measure)


def _two_objects(context: Context) -> Sequence[Figure]:
    from dsd_fast.bench.suites.mini_card.pictures import two_objects

    return two_objects(_model(context), _judge(context), N)


def _digit_pictures(context: Context) -> Sequence[Figure]:
    from dsd_fast.bench.suites.mini_card.pictures import digit_pictures

    return digit_pictures(_model(context), _judge(context))


def _judge_itself(context: Context) -> Sequence[Figure]:
    from dsd_fast.bench.suites.mini_card.pictures import judge_itself

    return judge_itself(_model(context), _judge(context), N)


def _probe(what: str, timestep: int, floor: float | None) -> Quality:
    def measure(context: Context) -> Sequence[Figure]:
        from dsd_fast.bench.suites.mini_card.probes import probe

        return [probe(_model(context), what, timestep, N, floor=floor)]

    return Quality(f"probe/{what}/{timestep}", "activations", measure)


def _pointing(context: Context) -> Sequence[Figure]:
    from dsd_fast.bench.suites.mini_card.captions import pointing

    return pointing(_model(context), N)


def _content_shift(timestep: int) -> Quality:
    def measure(context: Context) -> Sequence[Figure]:
        from dsd_fast.bench.suites.mini_card.probes import content_shift

        return content_shift(_model(context), timestep, N)

    return Quality(f"shift/{timestep}", "shift", measure)


def _reconstruction(context: Context) -> Sequence[Figure]:
    from dsd_fast.bench.suites.mini_card.probes import reconstruction

    return [reconstruction(_model(context), N)]


def _parts(context: Context) -> Sequence[Figure]:
    from dsd_fast.models.mini import path

    model = _model(context)
    networks = {"UNet": model.unet, "VAE": model.vae, "CLIP, text tower included": model.clip}
    counts = {name: sum(p.numel() for p in network.parameters()) / 1e6 for name, network in networks.items()}
    size = sum(file.stat().st_size for file in path().rglob("*") if file.is_file()) / 1e6
    figures = [Figure(name, count, count, count, 1, unit="million parameters") for name, count in counts.items()]
    return [*figures, Figure("all files", size, size, size, 1, unit="MB")]


# The figures that must not fall below what later measurements rest on.
_CAPTION_FLOORS = {("new scenes", 16): 0.90, ("held-out pairs", 16): 0.80}

suite = Suite(
    "mini-card",
    "what the embedded model can do",
    groups=(
        Group("captions", "Captions told apart by the noise term", plot="quality", x="timesteps"),
        Group("pointing", "Heat maps whose maximum lies on the word's object"),
        Group("pictures", "Generated pictures that show what was asked for"),
        Group("activations", "Linear probes of the activations"),
        Group("shift", "Error of the one-step prediction by the prompt"),
        Group("parts", "Its parts, and the judge"),
    ),
    cases=(
        *(_scenes(group, steps, _CAPTION_FLOORS.get((group, steps))) for group in _GROUPS for steps in (1, 4, 16)),
        *(_digits(steps, 0.80 if steps == 16 else None) for steps in (1, 4, 16)),
        Quality("pointing", "pointing", _pointing),
        _one_object("new scenes", 0.85),
        _one_object("held-out pairs", 0.60),
        Quality("pictures/two-objects", "pictures", _two_objects),
        Quality("pictures/digits", "pictures", _digit_pictures),
        *(
            _probe(what, timestep, 0.93 if (what, timestep) == ("shape", 200) else None)
            for what in ("colour", "shape", "digit")
            for timestep in (50, 200, 500)
        ),
        *(_content_shift(timestep) for timestep in (200, 500, 800)),
        Quality("parts/size", "parts", _parts),
        Quality("parts/vae", "parts", _reconstruction),
        Quality("parts/judge", "parts", _judge_itself),
    ),
)
