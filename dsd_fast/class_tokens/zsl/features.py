"""Features of image files, made once and kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd_fast.engine.preprocessing import Picture
from dsd_fast.images import ImageError, load_image
from dsd_fast.images.batch import ahead
from dsd_fast.jobs import read_tensors, remove_stale, row_id, write_tensors

Features = Callable[[Sequence[Picture]], Tensor]
"""From n pictures (H, W, 3) of 8 bits, each of its own size, to (n, D)."""

# What a process that dies loses is a part at most.
_PART = 256
# Of photographs of 12 million pixels, 36 MB each.
_TOGETHER = 16
_LOADERS = 4


def features_of(
    files: Sequence[Path],
    digests: Sequence[str],
    features: Features,
    about: str,
    folder: Path,
    progress: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Give the features of images, from the files of an earlier call where these are of the same.

    Args:
        files: (N,) of the images.
        digests: (N,) of what the images depend on.
        features: of a few images at a time.
        about: digest of all that changes them.
        folder: of parts of some images each, ``00000.safetensors``, …; the caller has a lock.

    Returns:
        (N, D) float32, rows of NaN for images that cannot be used; and what is wrong with those, by number.
    """
    parts, errors = [], dict[int, str]()
    for number, start in enumerate(range(0, len(files), _PART)):
        some = slice(start, start + _PART)
        file = folder / f"{number:05d}.safetensors"
        of = row_id(about, *digests[some])
        known, kept = read_tensors(file) if file.is_file() else ({}, {})
        if kept.get("of") != of:
            rows, wrong = _made(files[some], features)
            known, kept = {"features": rows}, {"of": of, "errors": wrong}
            if folder.is_dir():
                remove_stale(file)
            write_tensors(file, known, kept)
        parts.append(known["features"].numpy())
        errors |= {start + int(place): message for place, message in kept["errors"].items()}
        if progress is not None:
            progress(min(len(files), start + _PART))
    width = max(part.shape[1] for part in parts)
    # Of a part of which no image can be used the width is not known.
    return np.concatenate([part if part.shape[1] else np.full((len(part), width), np.nan) for part in parts]), errors


def _made(files: Sequence[Path], features: Features) -> tuple[Tensor, dict[str, str]]:
    found: dict[int, Tensor] = {}
    errors: dict[str, str] = {}
    pictures: dict[int, Picture] = {}
    for place, loaded in enumerate(ahead(_load, files, workers=_LOADERS, read_ahead=2 * _LOADERS, name="dsd-decode")):
        if isinstance(loaded, ImageError):
            errors[str(place)] = str(loaded)
        else:
            pictures[place] = loaded
        if len(pictures) == _TOGETHER or (pictures and place == len(files) - 1):
            with torch.no_grad():
                rows = features(list(pictures.values())).float().cpu()
            for number, row in zip(pictures, rows, strict=True):
                found[number] = row
                if not row.isfinite().all():
                    errors[str(number)] = f"{files[number]}: its features are no finite numbers"
            pictures.clear()
    width = len(next(iter(found.values()))) if found else 0
    made = torch.full((len(files), width), torch.nan, dtype=torch.float32, device="cpu")
    for place, row in found.items():
        if str(place) not in errors:
            made[place] = row
    return made, errors


def _load(file: os.PathLike[str]) -> Picture | ImageError:
    try:
        return np.array(load_image(file))
    except ImageError as error:
        return error
