"""Heat maps of a pair as files, a picture and the arrays, and as pictures of a report."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save as to_safetensors

from dsd_fast.images.overlay import colours, overlay
from dsd_fast.images.panel import panel
from dsd_fast.jobs import replacing
from dsd_fast.matching.heatmaps import Heatmap

FOLDER = "heatmaps"

NAMES = re.compile(r"\d{5,}-\d+\.(png|safetensors)")
"""The names of the files that :func:`save` writes."""


@dataclass(frozen=True)
class WordMaps:
    """The heat maps of one caption over one image, ready to be shown.

    Attributes:
        caption: whose words they are.
        words: [(start, end, picture), …], positions in the caption and the overlay.
        top: the attention probability that has the last colour, the same for all of them.
        left_out: how many more words have maps that are not shown.
    """

    caption: str
    words: list[tuple[int, int, Image.Image]]
    top: float
    left_out: int = 0


def largest(maps: Sequence[Heatmap]) -> float:
    """Finds the largest value of all maps, which their common scale ends with; never 0."""
    return max(max((float(np.nan_to_num(values).max()) for _, _, values in maps), default=0.0), 1e-6)


def shown(image: Image.Image, caption: str, maps: Sequence[Heatmap], most: int) -> WordMaps:
    """Makes the overlays of the first `most` maps, on the scale of all of them."""
    top = largest(maps)
    words = [(*span, overlay(image, values, top)) for _, span, values in maps[:most]]
    return WordMaps(caption, words, top, max(0, len(maps) - most))


def scale() -> Image.Image:
    """Draws the scale's colours from left to right."""
    row = colours(np.linspace(0, 1, 256))
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(row, (12, 256, 3))))


def save(
    folder: Path, index: int, rank: int, image: Image.Image, path: str, caption: str, maps: Sequence[Heatmap]
) -> dict[str, str]:
    """Writes the maps of an image and its caption of that rank into `folder`; returns the files' names in the results.

    The picture has them over the image. The arrays are "maps" (n, height, width) float32 and "spans" (n, 2) int64,
    start and end of each in the caption; image, caption and the n words stand in the metadata, the words as JSON.
    """
    names = {kind: f"{index:05d}-{rank}.{kind}" for kind in ("png", "safetensors")}
    with replacing(folder / names["png"]) as file:
        panel(image, caption, [(span, values) for _, span, values in maps], largest(maps)).save(file, "PNG")
    spans = np.array([span for _, span, _ in maps], np.int64).reshape(-1, 2)
    values = np.stack([each for _, _, each in maps]) if maps else np.empty((0, 0, 0), np.float32)
    metadata = {"image": path, "caption": caption, "words": json.dumps([word for word, _, _ in maps])}
    with replacing(folder / names["safetensors"]) as file:
        file.write(to_safetensors({"maps": np.ascontiguousarray(values), "spans": spans}, metadata))
    return {"picture": f"{FOLDER}/{names['png']}", "arrays": f"{FOLDER}/{names['safetensors']}"}
