"""Procedural captioned scenes: coloured shapes on a plain background, one object or two in a spatial relation.

The task is fixed: changing what a seed draws changes every figure measured on it. Pixel coordinates are (x, y) with
the origin at the image's upper left corner; the centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COLOURS",
    "EVAL_SEED",
    "HELD_OUT",
    "IMAGE_SIZE",
    "NEGATIVE_KINDS",
    "PAIRS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Scene",
    "SceneObject",
    "scene",
]

Floats = NDArray[np.floating[Any]]

IMAGE_SIZE = 64
EVAL_SEED = 1_000_000_000
"""Scenes with this seed or a larger one are for evaluation and never trained on."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.12, 0.68, 0.20),
    "blue": (0.14, 0.28, 0.92),
    "yellow": (0.97, 0.86, 0.10),
    "purple": (0.60, 0.16, 0.74),
    "cyan": (0.10, 0.82, 0.88),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES: dict[str, tuple[float, float]] = {"small": (7.0, 8.5), "large": (11.5, 13.5)}
"""Range of an object's radius in pixels: every shape lies in the square of that half side around its centre."""
RELATIONS: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""Each relation with its opposite."""
HELD_OUT = frozenset({("red", "ring"), ("green", "triangle"), ("blue", "cross"), ("yellow", "square")})
"""(colour, shape) pairs that no training scene and no negative caption of one contains."""
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
NEGATIVE_KINDS = ("colour", "shape", "swap", "relation")

_TRAINED = tuple(pair for pair in PAIRS if pair not in HELD_OUT)
_HELD_OUT = tuple(pair for pair in PAIRS if pair in HELD_OUT)
_MARGIN = 1.5
_GAP = 2.5
_GRID_Y, _GRID_X = (axis.astype(np.float32) for axis in np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5)


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        mask: bool (64, 64), the pixels that show the object (a ring's hole is not part of it).
        box: x0, y0, x1, y1 in pixels, the mask's bounding box with x1 and y1 exclusive.
        keypoints: named (x, y) points: centre, top, right, bottom, left. A triangle's right and left are its base
            corners; a ring's points lie on its outer edge.
        named_size: whether the caption tells the size.
    """

    colour: str
    shape: str
    size: str
    mask: NDArray[np.bool_]
    box: tuple[int, int, int, int]
    keypoints: dict[str, tuple[float, float]]
    named_size: bool


@dataclass(frozen=True)
class Scene:
    """A picture with its ground truth.

    Attributes:
        image: uint8 (64, 64, 3), RGB.
        caption: a true description, for instance "a small red circle left of a blue square".
        objects: one or two objects, in the caption's order. Two objects differ in colour and in shape.
        relation: where the first object lies relative to the second; None with one object.
    """

    seed: int
    image: NDArray[np.uint8]
    caption: str
    objects: tuple[SceneObject, ...]
    relation: str | None

    def negatives(self) -> dict[str, str]:
        """Hard negative captions by kind, each false of the scene and one change away from the caption.

        `colour` and `shape` give one object a colour or shape that the scene lacks; `swap` exchanges the two objects'
        colours; `relation` names the opposite relation. One object has only the first two. No negative contains a
        held-out pair, unless the scene has one that the change leaves as it is.
        """
        rng = np.random.default_rng((self.seed, 1))
        names = [(item.colour, item.shape) for item in self.objects]
        first = next((i for i, name in enumerate(names) if name in HELD_OUT), int(rng.integers(len(names))))
        colour, shape = names[first]
        colours = [c for c in COLOURS if all(c != name[0] for name in names) and (c, shape) not in HELD_OUT]
        shapes = [s for s in SHAPES if all(s != name[1] for name in names) and (colour, s) not in HELD_OUT]
        changed = {
            "colour": (colours[int(rng.integers(len(colours)))], shape),
            "shape": (colour, shapes[int(rng.integers(len(shapes)))]),
        }
        captions = {
            kind: self._describe([pair if i == first else name for i, name in enumerate(names)], self.relation)
            for kind, pair in changed.items()
        }
        if self.relation is not None:
            (colour_a, shape_a), (colour_b, shape_b) = names
            captions["swap"] = self._describe([(colour_b, shape_a), (colour_a, shape_b)], self.relation)
            captions["relation"] = self._describe(names, RELATIONS[self.relation])
        return captions

    def _describe(self, names: list[tuple[str, str]], relation: str | None) -> str:
        sizes = [item.size if item.named_size else None for item in self.objects]
        return _caption(names, sizes, relation)


def scene(seed: int, *, objects: int | None = None, held_out: bool | None = False) -> Scene:
    """Draws the scene of a seed.

    Args:
        seed: 0 or more; from `EVAL_SEED` on for evaluation.
        objects: 1 or 2; None lets the seed choose.
        held_out: False draws trained (colour, shape) pairs only, True exactly one held-out pair, None any pair.

    Raises:
        ValueError: a negative seed, or `objects` that is neither 1, 2 nor None.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if objects not in (None, 1, 2):
        raise ValueError(f"objects must be 1, 2 or None, got {objects!r}")
    rng = np.random.default_rng((seed, 0))
    count = objects if objects is not None else int(rng.random() < 0.65) + 1
    names = _draw_names(rng, count, held_out)
    sizes = [("small", "large")[int(rng.integers(2))] for _ in names]
    named = [bool(rng.random() < 0.5) for _ in names]
    radii = [float(rng.uniform(*SIZES[size])) for size in sizes]
    relation = None if count == 1 else tuple(RELATIONS)[int(rng.integers(len(RELATIONS)))]
    centres = _place(rng, radii, relation)

    canvas = _background(rng)
    drawn = []
    for (colour, shape), size, named_size, radius, (x, y) in zip(names, sizes, named, radii, centres, strict=True):
        cover = np.clip(0.5 - _distance(shape, _GRID_X - x, _GRID_Y - y, radius), 0, 1)
        paint = np.asarray(COLOURS[colour], np.float32) * rng.uniform(0.78, 1.0) + rng.uniform(-0.04, 0.04, 3)
        canvas += cover[..., None] * (paint.astype(np.float32) - canvas)
        mask = cover > 0.5
        drawn.append(SceneObject(colour, shape, size, mask, _box(mask), _keypoints(shape, x, y, radius), named_size))
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(0, 0.035))
    image = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    caption = _caption(names, [s if n else None for s, n in zip(sizes, named, strict=True)], relation)
    return Scene(seed, image, caption, tuple(drawn), relation)


def _draw_names(rng: np.random.Generator, count: int, held_out: bool | None) -> list[tuple[str, str]]:
    pool = PAIRS if held_out is None else _TRAINED
    while True:
        names = [pool[int(rng.integers(len(pool)))] for _ in range(count)]
        if held_out:
            names[int(rng.integers(count))] = _HELD_OUT[int(rng.integers(len(_HELD_OUT)))]
        if count == 1:
            return names
        (colour_a, shape_a), (colour_b, shape_b) = names
        if colour_a == colour_b or shape_a == shape_b:
            continue
        if (colour_b, shape_a) not in HELD_OUT and (colour_a, shape_b) not in HELD_OUT:
            return names


def _caption(names: list[tuple[str, str]], sizes: list[str | None], relation: str | None) -> str:
    phrases = [f"a {size} {c} {s}" if size else f"a {c} {s}" for (c, s), size in zip(names, sizes, strict=True)]
    return phrases[0] if relation is None else f"{phrases[0]} {relation} {phrases[1]}"


def _place(rng: np.random.Generator, radii: list[float], relation: str | None) -> list[tuple[float, float]]:
    if relation is None:
        low, high = _MARGIN + radii[0], IMAGE_SIZE - _MARGIN - radii[0]
        return [(float(rng.uniform(low, high)), float(rng.uniform(low, high)))]
    # Along the relation's axis the objects' squares are apart; across it they stay well within 45 degrees, so that
    # only the stated relation describes them.
    forward = relation in ("left of", "above")
    near, far = radii if forward else radii[::-1]
    free = IMAGE_SIZE - 2 * _MARGIN - 2 * near - 2 * far - _GAP
    before, between = np.sort(rng.random(2)) * free
    main_near = _MARGIN + near + before
    main_far = main_near + near + far + _GAP + (between - before)
    reach = 0.6 * (main_far - main_near)
    side_near = rng.uniform(_MARGIN + near, IMAGE_SIZE - _MARGIN - near)
    low, high = _MARGIN + far, IMAGE_SIZE - _MARGIN - far
    side_far = rng.uniform(np.clip(side_near - reach, low, high), np.clip(side_near + reach, low, high))
    points = [(float(main_near), float(side_near)), (float(main_far), float(side_far))]
    if relation in ("above", "below"):
        points = [(side, main) for main, side in points]
    return points if forward else points[::-1]


def _background(rng: np.random.Generator) -> Floats:
    """A light or dark, almost neutral colour with a linear gradient, float32 (64, 64, 3)."""
    level = rng.uniform(0.78, 0.97) if rng.random() < 0.5 else rng.uniform(0.03, 0.22)
    tint = (level + rng.uniform(-0.04, 0.04, 3)).astype(np.float32)
    angle, amount = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.12)
    ramp = (np.cos(angle) * (_GRID_X - 32) + np.sin(angle) * (_GRID_Y - 32)) * (amount / IMAGE_SIZE)
    background: Floats = tint + ramp[..., None].astype(np.float32)
    return background


def _distance(shape: str, x: Floats, y: Floats, r: float) -> Floats:
    """Signed distance to the shape's edge in pixels, negative inside; exact near straight edges and circles."""
    distance: Floats
    if shape == "circle":
        distance = np.hypot(x, y) - r
    elif shape == "ring":
        distance = np.abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r
    elif shape == "triangle":
        # Apex (0, -r), base corners (±r, 0.8 r).
        distance = np.maximum(y - 0.8 * r, (1.8 * np.abs(x) - y - r) / float(np.hypot(1.8, 1.0)))
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
    else:
        x, y = np.abs(x), np.abs(y)
        distance = np.minimum(np.maximum(x - 0.34 * r, y - r), np.maximum(x - r, y - 0.34 * r))
    return distance


def _keypoints(shape: str, x: float, y: float, r: float) -> dict[str, tuple[float, float]]:
    half = 0.88 * r if shape == "square" else r
    offsets = {"centre": (0.0, 0.0), "top": (0, -half), "right": (half, 0), "bottom": (0, half), "left": (-half, 0)}
    if shape == "triangle":
        offsets |= {"right": (r, 0.8 * r), "bottom": (0, 0.8 * r), "left": (-r, 0.8 * r)}
    return {name: (x + dx, y + dy) for name, (dx, dy) in offsets.items()}


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
