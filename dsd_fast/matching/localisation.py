"""Whether a word's heat map finds its object: the pointing game on scenes whose objects are known.

Zhang et al. 2016, "Top-down Neural Attention by Excitation Backprop" (arXiv 1608.00507), section 4.1: a hit is a
map whose maximum lies on the object; without that paper's tolerance of 15 pixels, which would cover these objects.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsd_fast.matching.heatmaps import Heatmap
from dsd_fast.matching.matcher import Matcher
from dsd_fast.matching.words import Span
from dsd_fast.models.mini.scenes import Scene

KINDS = ("colour", "shape")


@dataclass(frozen=True)
class Pointing:
    """Hits of the pointing game.

    Attributes:
        right: maps whose maximum lies inside the object's mask.
        n: maps looked at.
        chance: the mean share of the image that the masks cover, what a random point would hit; nan without maps.
    """

    right: int
    n: int
    chance: float


@dataclass(frozen=True)
class ObjectWord:
    """A word that stands for one object of a scene.

    Attributes:
        kind: "colour" or "shape".
        span: where the word stands in the scene's caption.
        mask: bool (64, 64), the object's pixels.
    """

    kind: str
    span: Span
    mask: NDArray[np.bool_]


def object_words(scene: Scene) -> list[ObjectWord]:
    """The colour and shape words of a scene's caption; two objects differ in both, so each word has one object."""
    found = []
    for item in scene.objects:
        for kind, word in zip(KINDS, (item.colour, item.shape), strict=True):
            match = re.search(rf"\b{word}\b", scene.caption)
            assert match is not None
            found.append(ObjectWord(kind, match.span(), item.mask))
    return found


def pointing(scenes: Iterable[Scene], maps: Iterable[Sequence[Heatmap]]) -> dict[str, Pointing]:
    """The pointing game's result for "colour" and "shape" words; scenes and maps are taken one by one.

    Args:
        scenes: with their ground truth.
        maps: of each scene's caption, (64, 64) each; those of other words are ignored.

    Raises:
        ValueError: a map of another size than the masks'.
        KeyError: a scene without the map of one of its colour and shape words.
    """
    right, areas = dict.fromkeys(KINDS, 0), {kind: list[float]() for kind in KINDS}
    for scene, own in zip(scenes, maps, strict=True):
        by_span = {span: values for _, span, values in own}
        for word in object_words(scene):
            values = by_span[word.span]
            if values.shape != word.mask.shape:
                raise ValueError(f"maps: got {values.shape}, expected the masks' size {word.mask.shape}")
            right[word.kind] += bool(word.mask.flat[int(values.argmax())])
            areas[word.kind].append(float(word.mask.mean()))
    return {
        kind: Pointing(
            right[kind], len(areas[kind]), sum(areas[kind]) / len(areas[kind]) if areas[kind] else float("nan")
        )
        for kind in KINDS
    }


def pointing_game(
    matcher: Matcher, scenes: Iterable[Scene], *, layers: str | Sequence[str] = "up-finest"
) -> dict[str, Pointing]:
    """:func:`pointing` with the matcher's own maps of the scenes' true captions.

    Raises:
        ValueError: a matcher with another image size than the scenes'; unknown ``layers``.
    """
    played, drawn = itertools.tee(scenes)
    maps = (
        matcher.heatmap(scene.image, scene.caption, spans=[word.span for word in object_words(scene)], layers=layers)
        for scene in drawn
    )
    return pointing(played, maps)
