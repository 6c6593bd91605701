"""Scenes with their ground truth: those that figures are told on, and the labelled ones of each run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsd_fast.models.mini.scenes import EVAL_SEED, IMAGE_SIZE, SHAPES, Scene, SceneObject, scene

__all__ = [
    "CLASSES",
    "EXAMPLE_SEED",
    "KEYPOINTS",
    "STRIDE",
    "Pair",
    "Size",
    "labels",
    "pairs",
    "present",
    "scenes",
    "seeds",
]

EXAMPLE_SEED = 900_000_000
"""Scenes from here on are labelled examples, and used for nothing else."""
_RUNS_APART = 1_000_000

CLASSES = ("background", *SHAPES)
"""Of a pixel."""
KEYPOINTS = ("centre", "top", "right", "bottom", "left")
"""Scenes are upright, so that the top of a circle, too, is one point: where its edge is level and the object below it.
What can be told by looking at one spot differs, though: a corner is found so, while the middle of a side of a square
looks like the rest of that side, and the centre of a ring like background.
"""
STRIDE = 3
"""Every third pixel of every third row is labelled and classified: at all four places that a pixel can have along a
cell of the latents."""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        scenes: evaluation scenes n; as many pairs of them.
        examples: scenes with the labels of linear probes, of each run.
        labelled: numbers of images with labelled pixels, ascending; each the first of the examples.
        runs: each with examples, noise and first weights of its own.
        steps: of a classifier's training.
    """

    scenes: int = 1000
    examples: int = 300
    labelled: tuple[int, ...] = (8, 16, 32)
    runs: int = 3
    steps: int = 250


@dataclass(frozen=True)
class Pair:
    """An object of one scene and one of the same shape in another, of another colour and size.

    Attributes:
        source, target: places of the scenes.
        of, to: the objects.
    """

    source: int
    target: int
    of: SceneObject
    to: SceneObject


def scenes(size: Size, run: int | None) -> list[Scene]:
    """Scenes of two objects: for evaluation, or the examples of a run."""
    first, count = (EVAL_SEED, size.scenes) if run is None else (EXAMPLE_SEED + _RUNS_APART * run, size.examples)
    return [scene(first + place, objects=2) for place in range(count)]


def seeds(count: int, run: int, examples: bool) -> list[int]:
    """Of the noise of each scene: one noise for all could be learnt, and be matched between two scenes."""
    first = _RUNS_APART * (2 * run + examples)
    return list(range(first, first + count))


def pairs(drawn: list[Scene]) -> list[Pair]:
    """A pair from each scene that has one; which object and which target is drawn.

    Two objects of a scene differ in shape, so that in the target just one object has the shape.
    """
    draw = np.random.default_rng(0)
    found = []
    for source, each in enumerate(drawn):
        of = each.objects[int(draw.integers(len(each.objects)))]
        targets = [
            Pair(source, target, of, to)
            for target, other in enumerate(drawn)
            if target != source
            for to in other.objects
            if to.shape == of.shape and to.colour != of.colour and to.size != of.size
        ]
        if targets:
            found.append(targets[int(draw.integers(len(targets)))])
    return found


def labels(drawn: list[Scene]) -> NDArray[np.int64]:
    """(N, 22, 22) classes of the pixels that count."""
    maps = np.zeros((len(drawn), IMAGE_SIZE, IMAGE_SIZE), np.int64)
    for each, classes in zip(drawn, maps, strict=True):
        for item in each.objects:
            classes[item.mask] = CLASSES.index(item.shape)
    return maps[:, ::STRIDE, ::STRIDE]


def present(drawn: list[Scene]) -> NDArray[np.bool_]:
    """(N, 5): which shapes a scene shows."""
    return np.array([[shape in {item.shape for item in each.objects} for shape in SHAPES] for each in drawn])
