"""scikit-learn's handwritten digits as captioned 64×64 pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .scenes import COLOURS, IMAGE_SIZE

__all__ = ["DIGIT_NAMES", "EVALUATION", "TRAINING", "Digit", "caption", "digit"]

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAINING = range(1437)
EVALUATION = range(1437, 1797)
"""Indices into the data set: the last 360 are for evaluation and never trained on."""


@dataclass(frozen=True)
class Digit:
    """A picture of a handwritten digit: uint8 (64, 64, 3) RGB, its caption, and its value 0 to 9."""

    image: NDArray[np.uint8]
    caption: str
    label: int


def caption(label: int) -> str:
    """The caption of a digit's value, for instance "a photo of the digit three"."""
    return f"a photo of the digit {DIGIT_NAMES[label]}"


def digit(index: int, seed: int = 0) -> Digit:
    """One handwriting of the data set; the seed chooses its colours, size and place.

    Raises:
        IndexError: `index` outside `TRAINING` and `EVALUATION`.
        ImportError: scikit-learn is not installed.
    """
    if not 0 <= index < EVALUATION.stop:
        raise IndexError(f"index must be between 0 and {EVALUATION.stop - 1}, got {index}")
    images, labels = _data()
    rng = np.random.default_rng((seed, index, 2))
    side = int(rng.integers(50, 63))
    ink = np.asarray(Image.fromarray(images[index]).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    cover = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 1), np.float32)
    top, left = rng.integers(0, IMAGE_SIZE - side + 1, 2)
    cover[top : top + side, left : left + side, 0] = np.clip(ink / 255, 0, 1)
    dark = rng.random() < 0.5
    ground = (rng.uniform(0.03, 0.22) if dark else rng.uniform(0.78, 0.97)) + rng.uniform(-0.04, 0.04, 3)
    if rng.random() < 0.5:
        paint = np.full(3, rng.uniform(0.85, 1.0) if dark else rng.uniform(0.0, 0.2))
    else:
        paint = np.asarray(tuple(COLOURS.values())[int(rng.integers(len(COLOURS)))]) * rng.uniform(0.78, 1.0)
    canvas = ground + cover * (paint - ground) + rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 3)) * rng.uniform(0, 0.03)
    label = int(labels[index])
    return Digit((np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), caption(label), label)


@cache
def _data() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    return (bunch.images * (255 / 16)).astype(np.uint8), bunch.target
