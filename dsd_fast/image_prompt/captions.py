"""Sets of captions by name, on which a converter is set: made here, of no data."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import cache

from dsd_fast.models.mini import digits, scenes

_COUNT = 1024

_TEMPLATES = (
    "a photo of {}", "{}", "a picture of {}", "a close-up of {}", "a painting of {}", "a drawing of {}",
    "a black and white photo of {}", "a bright photo of {}", "a view of {}", "an old photograph of {}",
)  # fmt: skip
_ATTRIBUTES = (
    "red", "green", "blue", "yellow", "white", "black", "brown", "grey", "orange", "pink", "purple", "small", "large",
    "old", "new", "wooden", "broken", "shiny", "wet", "colourful", "tiny", "round", "dirty", "beautiful",
)  # fmt: skip
_THINGS = (
    "dog", "cat", "horse", "cow", "sheep", "bird", "fish", "elephant", "bear", "lion", "butterfly", "spider", "man",
    "woman", "child", "farmer", "doctor", "dancer", "car", "bus", "truck", "train", "bicycle", "boat", "aeroplane",
    "house", "church", "castle", "bridge", "tower", "tree", "flower", "mushroom", "leaf", "mountain", "river", "apple",
    "banana", "pizza", "cake", "sandwich", "salad", "chair", "table", "bed", "lamp", "clock", "book", "bottle", "cup",
    "guitar", "piano", "ball", "kite", "umbrella", "hat", "shoe", "shirt", "computer", "telephone", "camera", "robot",
    "statue", "painting",
)  # fmt: skip
_PLACES = (
    "", "on a beach", "in a forest", "in the snow", "on a street", "in a kitchen", "in a garden", "in a field",
    "at night", "in the rain", "on a table", "near a lake", "in a city", "in a room", "under a bridge", "on grass",
)  # fmt: skip


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _things() -> list[str]:
    draw = random.Random(0)
    texts: dict[str, None] = {}
    while len(texts) < _COUNT:
        thing = _a(
            f"{draw.choice(_ATTRIBUTES)} {draw.choice(_THINGS)}" if draw.random() < 0.7 else draw.choice(_THINGS)
        )
        if draw.random() < 0.25:
            thing += f" {draw.choice(('and', 'next to', 'behind', 'with'))} {_a(draw.choice(_THINGS))}"
        texts[draw.choice(_TEMPLATES).format(f"{thing} {draw.choice(_PLACES)}".strip())] = None
    return list(texts)


def _scenes() -> list[str]:
    # Of seeds that the model was trained on.
    texts = [scenes.scene(seed).caption for seed in range(_COUNT // 2)]
    texts += [digits.caption(label) for label in range(len(digits.DIGIT_NAMES))]
    return list(dict.fromkeys(texts))


SETS: Mapping[str, Callable[[], list[str]]] = {"things": _things, "scenes": _scenes}
"""By name: "things", everyday things with attributes and places; "scenes", the mini model's own captions."""


@cache
def captions_of(name: str) -> tuple[str, ...]:
    """Give the different captions of a set, the same in every run."""
    return tuple(SETS[name]())
