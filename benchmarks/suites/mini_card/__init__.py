"""The mini model's card: what it can do, on data that it has never seen.

Nothing is timed here, so it may run beside other work; what matching costs is in the suite `match`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsd_fast.bench.case import Context, Figure, Group, Quality, Suite
from dsd_fast.bench.suites.shared import mini

__all__ = ["FLOORS", "N", "suite"]

N = 1000
"""Evaluation scenes a figure; digits: all 360."""

FLOORS = {
    "captions/new-scenes/16": 0.90,
    "captions/held-out-pairs/16": 0.80,
    "captions/digits/16": 0.80,
    "pictures/one-object/new-scenes": 0.85,
    "pictures/one-object/held-out-pairs": 0.60,
    "probe/shape/200": 0.93,
}
"""Case → the least value of its figure ("3-way" of the captions, "all" of the pictures) that passes.

Later measurements rest on these figures.
"""

_GROUPS = {"new scenes": False, "held-out pairs": True}


def _slug(group: str) -> str:
    return group.replace(" ", "-")


def _judge(context: Context) -> Any:
    from benchmarks.suites.mini_card.judge import judge

    model = mini(context)
    return context.shared("judge", lambda: judge(model.vae).to(model.device))


def _scenes(group: str, steps: int) -> Quality:
    name = f"captions/{_slug(group)}/{steps}"

    def measure(context: Context) -> Sequence[Figure]:
        from benchmarks.suites.mini_card.captions import scenes

        return scenes(mini(context), steps, N, group, _GROUPS[group], FLOORS.get(name))

    return Quality(name, "captions", measure)


def _digits(steps: int) -> Quality:
    name = f"captions/digits/{steps}"

    def measure(context: Context) -> Sequence[Figure]:
        from benchmarks.suites.mini_card.captions import digits

        return digits(mini(context), steps, floor=FLOORS.get(name))

    return Quality(name, "captions", measure)


def _one_object(group: str) -> Quality:
    name = f"pictures/one-object/{_slug(group)}"

    def measure(context: Context) -> Sequence[Figure]:
        from benchmarks.suites.mini_card.pictures import one_object

        return one_object(mini(context), _judge(context), N, f"one object, {group}", _GROUPS[group], FLOORS.get(name))

    return Quality(name, "pictures", measure)


def _two_objects(context: Context) -> Sequence[Figure]:
    from benchmarks.suites.mini_card.pictures import two_objects

    return two_objects(mini(context), _judge(context), N)


def _digit_pictures(context: Context) -> Sequence[Figure]:
    from benchmarks.suites.mini_card.pictures import digit_pictures

    return digit_pictures(mini(context), _judge(context))


def _judge_itself(context: Context) -> Sequence[Figure]:
    from benchmarks.suites.mini_card.pictures import judge_itself

    return judge_itself(mini(context), _judge(context), N)


def _probe(what: str, timestep: int) -> Quality:
    name = f"probe/{what}/{timestep}"

    def measure(context: Context) -> Sequence[Figure]:
        from benchmarks.suites.mini_card.probes import probe

        return [probe(mini(context), what, timestep, N, floor=FLOORS.get(name))]

    return Quality(name, "activations", measure)


def _pointing(context: Context) -> Sequence[Figure]:
    from benchmarks.suites.mini_card.captions import pointing

    return pointing(mini(context), N)


def _content_shift(timestep: int) -> Quality:
    def measure(context: Context) -> Sequence[Figure]:
        from benchmarks.suites.mini_card.probes import content_shift

        return content_shift(mini(context), timestep, N)

    return Quality(f"shift/{timestep}", "shift", measure)


def _reconstruction(context: Context) -> Sequence[Figure]:
    from benchmarks.suites.mini_card.probes import reconstruction

    return [reconstruction(mini(context), N)]


def _parts(context: Context) -> Sequence[Figure]:
    from dsd_fast.models.mini import path

    model = mini(context)
    networks = {"UNet": model.unet, "VAE": model.vae, "CLIP, text tower included": model.clip}
    counts = {name: sum(p.numel() for p in network.parameters()) / 1e6 for name, network in networks.items()}
    size = sum(file.stat().st_size for file in path().rglob("*") if file.is_file()) / 1e6
    figures = [Figure(name, count, count, count, 1, unit="million parameters") for name, count in counts.items()]
    return [*figures, Figure("all files", size, size, size, 1, unit="MB")]


suite = Suite(
    "mini-card",
    groups=(
        Group("captions", "Captions told apart by the noise term"),
        Group("pointing", "Heat maps whose maximum lies on the word's object"),
        Group("pictures", "Generated pictures that show what was asked for"),
        Group("activations", "Linear probes of the activations"),
        Group("shift", "Error of the one-step prediction by the prompt"),
        Group("parts", "Its parts, and the judge"),
    ),
    cases=(
        *(_scenes(group, steps) for group in _GROUPS for steps in (1, 4, 16)),
        *(_digits(steps) for steps in (1, 4, 16)),
        Quality("pointing", "pointing", _pointing),
        _one_object("new scenes"),
        _one_object("held-out pairs"),
        Quality("pictures/two-objects", "pictures", _two_objects),
        Quality("pictures/digits", "pictures", _digit_pictures),
        *(_probe(what, timestep) for what in ("colour", "shape", "digit") for timestep in (50, 200, 500)),
        *(_content_shift(timestep) for timestep in (200, 500, 800)),
        Quality("parts/size", "parts", _parts),
        Quality("parts/vae", "parts", _reconstruction),
        Quality("parts/judge", "parts", _judge_itself),
    ),
)
