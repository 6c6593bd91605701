"""Ways to get features, one thing changed at a time, and the features themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from benchmarks.suites.feature_quality import data
from benchmarks.suites.feature_quality.data import Size
from dsd_fast.bench.case import Context, UnavailableError
from dsd_fast.bench.suites.shared import mini
from dsd_fast.features import FeatureExtractor, Technique
from dsd_fast.models.mini import path
from dsd_fast.models.mini.scenes import SHAPES, Scene

__all__ = [
    "CONDITIONS",
    "GRID",
    "LAYERS",
    "Condition",
    "Features",
    "base",
    "caption",
    "extractor",
    "features",
    "named",
    "pictures",
]

LAYERS = "practical-mini"
GRID = 16
"""Side of a map, that of the latents; smaller maps are enlarged to it."""
_AT_ONCE = 100
_EVERY_SHAPE = " ".join(f"a {shape}" for shape in SHAPES)
_KEPT = ("plain", "t-150", "t-250", "words", "maps", "control", "lora")
"""Needed by several cases."""


@dataclass(frozen=True)
class Condition:
    """A way to get features.

    Attributes:
        name: of the case.
        says: the line in the tables.
        timestep, draws, denoise_from, denoise_steps, inversion: as `FeatureExtractor` and `Technique` take
            them.
        prompt: `caption`'s kind.
        attention: places whose attention maps are the features, instead of layers.
        told: whether the prompt says what classifiers are asked for, so that keypoints alone are measured.
        control, lora: whether the shipped ones are used.
        night: whether the scenes are shown at night, which the model has not seen, and its LoRA has.
        parts: names of conditions whose features are laid side by side, instead of all the above.
        mixed: whether these are amalgamated instead.
    """

    name: str
    says: str
    timestep: int = 50
    draws: int = 1
    prompt: str = "empty"
    told: bool = False
    attention: tuple[str, ...] = ()
    control: bool = False
    lora: bool = False
    denoise_from: int | None = None
    denoise_steps: int | None = None
    inversion: bool = False
    night: bool = False
    parts: tuple[str, ...] = ()
    mixed: bool = False


_MIXED = ("plain", "t-150", "words", "control", "lora")

CONDITIONS = (
    Condition("plain", "plain, t = 50"),
    Condition("t-0", "t = 0, the clean latent", timestep=0),
    Condition("t-150", "t = 150", timestep=150),
    Condition("t-250", "t = 250", timestep=250),
    Condition("t-500", "t = 500", timestep=500),
    Condition("timesteps", "t = 50, 150 and 250 side by side", parts=("plain", "t-150", "t-250")),
    Condition("draws", "mean of 3 noise draws", draws=3),
    Condition("words", "fine-grained prompt", prompt="words"),
    Condition("quality", "fine-grained prompt with quality words", prompt="quality"),
    Condition("caption", "the whole caption, shapes named", prompt="caption", told=True),
    Condition("control", "ControlNet", control=True),
    Condition("lora", "LoRA", lora=True),
    Condition("together", "prompt + ControlNet + LoRA", prompt="words", control=True, lora=True),
    Condition("night", "plain, at night", night=True),
    Condition("night-lora", "LoRA, at night", lora=True, night=True),
    Condition("night-together", "ControlNet + LoRA, at night", control=True, lora=True, night=True),
    Condition("inversion", "DDIM inversion", inversion=True),
    Condition("denoised", "denoised from t = 100 in 5 steps", denoise_from=100, denoise_steps=5),
    Condition("maps", "attention maps of all shapes' names alone", prompt="shapes", attention=("up_cross",)),
    Condition("attention", "attention maps of all shapes' names beside plain features", parts=("plain", "maps")),
    Condition("concatenated", "five conditions side by side", parts=_MIXED),
    Condition("amalgamated", "five conditions amalgamated", parts=_MIXED, mixed=True),
)


def base(condition: Condition) -> Condition:
    """What a condition is compared with: plain features of the same pictures."""
    return named("night" if condition.night else "plain")


def named(name: str) -> Condition:
    """The condition of that name."""
    return next(each for each in CONDITIONS if each.name == name)


def caption(drawn: Scene, kind: str) -> str:
    """A prompt. None but "caption" tells which shapes the scene shows, so that no label leaks into the features.

    Args:
        drawn: the scene.
        kind: "empty"; "words", the caption with "object" for each shape; "quality", that and quality words; "shapes",
            the names of all shapes, the same for every scene; "caption", the true one.
    """
    words = " ".join("object" if word in SHAPES else word for word in drawn.caption.split())
    kinds = {"empty": "", "words": words, "quality": f"{words}, high quality", "shapes": _EVERY_SHAPE}
    return (kinds | {"caption": drawn.caption})[kind]


def pictures(condition: Condition, drawn: Sequence[Scene]) -> list[NDArray[np.uint8]]:
    """The scenes' pictures as the condition shows them, uint8 (64, 64, 3)."""
    from benchmarks.mini.lora import night

    return [night(each.image, each.seed) if condition.night else each.image for each in drawn]


class Features:
    """Features of scenes: maps of each layer, as they were extracted, and what is read from them.

    Args:
        maps: of each layer (N, C, h, w), L2-normalised over channels.
    """

    def __init__(self, maps: Sequence[Tensor]) -> None:
        self.maps = list(maps)

    def __len__(self) -> int:
        return len(self.maps[0])

    def grid(self, rows: Sequence[int] | slice) -> Tensor:
        """(B, C, 16, 16) float32: the layers of some scenes, brought to one size (bilinear) and laid side by side."""
        some = [each[rows].float() for each in self.maps]
        return torch.cat([F.interpolate(each, (GRID, GRID), mode="bilinear") for each in some], 1)


def features(context: Context, condition: Condition, run: int, size: Size) -> tuple[Features, Features]:
    """Of the run's examples, and of the evaluation scenes, for a condition that is not amalgamated.

    Raises:
        UnavailableError: the weights that it needs are not there.
    """
    if condition.parts:
        parts = [features(context, named(part), run, size) for part in condition.parts]
        return tuple(Features([each for part in parts for each in part[which].maps]) for which in (0, 1))  # type: ignore[return-value]

    def make() -> tuple[Features, Features]:
        return _extracted(context, condition, run, size, True), _extracted(context, condition, run, size, False)

    if condition.name in _KEPT:
        return context.shared(f"features, {condition.name}, {run}, {size}", make)
    return make()


def _extracted(context: Context, condition: Condition, run: int, size: Size, examples: bool) -> Features:
    which = run if examples else None
    drawn = context.shared(f"scenes, {which}, {size}", lambda: data.scenes(size, which))
    taken = extractor(context, condition)
    noise, kept = data.seeds(len(drawn), run, examples), []
    for start in track(range(0, len(drawn), _AT_ONCE), f"{condition.name}, run {run}", transient=True):
        some = drawn[start : start + _AT_ONCE]
        found = taken.extract(
            pictures(condition, some),
            [caption(each, condition.prompt) for each in some],
            seeds=noise[start : start + _AT_ONCE],
        )
        kept.append([each[:, 0].cpu() for each in found.values()])
    return Features([torch.cat(layer) for layer in zip(*kept, strict=True)])


def extractor(context: Context, condition: Condition, *, raw: bool = False) -> FeatureExtractor:
    """What extracts a condition that has no parts.

    Args:
        context: of the run.
        condition: which.
        raw: leave features as they come.

    Raises:
        UnavailableError: the weights that it needs are not there.
    """
    technique = Technique(
        controls=[_control(context)] if condition.control else (),
        adapter="mini" if condition.lora else None,
        denoise_from=condition.denoise_from,
        denoise_steps=condition.denoise_steps,
        inversion=condition.inversion,
    )
    return FeatureExtractor(
        _adapted(context) if condition.lora else mini(context),
        () if condition.attention else LAYERS,
        [condition.timestep],
        attention=condition.attention,
        draws=condition.draws,
        normalize=not raw,
        dtype=None if raw else "float16",
        technique=technique,
    )


def _control(context: Context) -> Any:
    from dsd_fast.models.controlnet import Control, load_controlnet

    if not (path() / "controlnet").exists():
        raise UnavailableError("the embedded model has no ControlNet")
    return context.shared("mini ControlNet", lambda: Control(load_controlnet("mini", device=context.device)))


def _adapted(context: Context) -> Any:
    """The embedded model with its LoRA; another one, so that the plain one stays as it is."""
    from dsd_fast.models import load

    if not (path() / "lora").exists():
        raise UnavailableError("the embedded model has no LoRA")

    def make() -> Any:
        model = load("mini", device=context.device, local_files_only=True)
        model.load_lora("mini", "mini")
        return model

    return context.shared("mini with LoRA", make)
