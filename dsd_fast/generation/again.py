"""Images of a folder made again, from their rows of the index and the manifest alone."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dsd_fast.engine.items import read_source
from dsd_fast.generation.config import GenerateConfig
from dsd_fast.generation.encoding import Encoder
from dsd_fast.generation.files import KIND, read_images, read_settings
from dsd_fast.generation.rows import from_columns
from dsd_fast.generation.sampler import Sampler, to_uint8
from dsd_fast.generation.units import id_of
from dsd_fast.jobs import Timeline, open_manifest

# Levels of 256: arithmetic in another order moves what lies at a half to the next one.
_ROUNDING = 1


@dataclass(frozen=True)
class Again:
    """An image made again beside the one that the folder has.

    Attributes:
        row: the row of the index.
        made: (H, W, 3) uint8, made now.
        kept: the same of the folder's file.
        largest, mean: difference of their levels, 0 to 255; of a lossy format, both were encoded and decoded.
        same: whether the largest is at most 1; of a lossy format, in which a rounding may move a whole block, the mean.
    """

    row: Mapping[str, Any]
    made: npt.NDArray[np.uint8]
    kept: npt.NDArray[np.uint8]
    largest: int
    mean: float
    same: bool


def config_of(folder: str | os.PathLike[str], memory_budget: int | None = None) -> GenerateConfig:
    """The configuration that a folder's images were made with; a scheduler that was given as an object is the model's.

    Raises:
        ManifestError: it is no folder of generated images.
    """
    return GenerateConfig(**read_settings(Path(folder))["config"], memory_budget=memory_budget)


def again(sampler: Sampler, folder: str | os.PathLike[str], rows: Iterable[str]) -> Iterator[Again]:
    """Makes the images of some rows again, each alone, and compares them with the folder's files.

    Args:
        sampler: on the model that made the folder, with :func:`config_of` the folder.
        folder: that :func:`dsd_fast.generate` has filled, in whatever layout and by however many workers.
        rows: their ids.

    Raises:
        ManifestError: the sampler is not what made the folder (names each setting that differs), or it is no folder of
            generated images.
        ValueError: no such row, one without an image, or one whose source image was no file, or is another one now.
        ImageError: a source image that cannot be used any more.
        OSError: the folder cannot be read.
    """
    path = Path(folder)
    settings = read_settings(path)
    # What else is in the manifest says how images are kept.
    open_manifest(path, KIND, {**settings, **sampler.settings()})
    options = {"mark": settings["mark"], "about": {"model": settings["model"]}, "timeline": Timeline(), "threads": 1}
    with Encoder(settings["format"], settings["quality"], **options) as encoder:
        for content, columns in read_images(path, list(rows)):
            row = columns["id"]
            said = from_columns(columns, path)
            if id_of(columns, said, [digest for _, (digest, _, _) in map(read_source, said.sources)]) != row:
                images = ", ".join(map(str, said.sources)) or "none"
                raise ValueError(
                    f"row: {row} is not what its columns say, or of its images ({images}) one is another now"
                )
            (made,) = to_uint8(sampler.pixels([sampler.resolve(said)])).cpu().numpy()
            kept, like = _pixels(content), _pixels(encoder.submit(made, columns).result().image)
            difference = np.abs(kept.astype(np.int16) - like)
            largest, mean = int(difference.max()), float(difference.mean())
            lossless = settings["format"] == "png"
            yield Again(columns, made, kept, largest, mean, (largest if lossless else mean) <= _ROUNDING)


def _pixels(content: bytes) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))
