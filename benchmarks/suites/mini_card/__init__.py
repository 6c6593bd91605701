"""The mini model's card: what it can do, on data that it has never seen.

Nothing is timed here, so it may run beside other work; what matching costs is in the suite `match`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from benchmarks.suites.mini_card import captions, judge, pictures, probes
from dsd_fast.bench.case import Context, Figure, Group, Quality, Suite
from dsd_fast.bench.suites.shared import mini
from dsd_fast.models.mini import path

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


def _judge(context: Context) -> nn.Module:
    model = mini(context)
    return context.shared("judge", lambda: judge.judge(model.vae).to(model.device))


def _scenes(group: str, steps: int) -> Quality:
    name = f"captions/{_slug(group)}/{steps}"
    settings = (steps, N, group, _GROUPS[group], FLOORS.get(name))
    return Quality(name, "captions", lambda context: captions.scenes(mini(context), *settings))


def _digits(steps: int) -> Quality:
    name = f"captions/digits/{steps}"
    return Quality(name, "captions", lambda context: captions.digits(mini(context), steps, floor=FLOORS.get(name)))


def _one_object(group: str) -> Quality:
    name = f"pictures/one-object/{_slug(group)}"
    settings = (N, f"one object, {group}", _GROUPS[group], FLOORS.get(name))
    return Quality(name, "pictures", lambda context: pictures.one_object(mini(context), _judge(context), *settings))


def _probe(what: str, timestep: int) -> Quality:
    name = f"probe/{what}/{timestep}"
    floor = FLOORS.get(name)
    return Quality(name, "activations", lambda context: [probes.probe(mini(context), what, timestep, N, floor=floor)])


def _content_shift(timestep: int) -> Quality:
    return Quality(f"shift/{timestep}", "shift", lambda context: probes.content_shift(mini(context), timestep, N))


def _parts(context: Context) -> Sequence[Figure]:
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
        Quality("pointing", "pointing", lambda context: captions.pointing(mini(context), N)),
        *(_one_object(group) for group in _GROUPS),
        Quality(
            "pictures/two-objects",
            "pictures",
            lambda context: pictures.two_objects(mini(context), _judge(context), N),
        ),
        Quality("pictures/digits", "pictures", lambda context: pictures.digit_pictures(mini(context), _judge(context))),
        *(_probe(what, timestep) for what in probes.PROBED for timestep in (50, 200, 500)),
        *(_content_shift(timestep) for timestep in (200, 500, 800)),
        Quality("parts/size", "parts", _parts),
        Quality("parts/vae", "parts", lambda context: [probes.reconstruction(mini(context), N)]),
        Quality("parts/judge", "parts", lambda context: pictures.judge_itself(mini(context), _judge(context), N)),
    ),
)
