"""Features of image files, made once and kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd_fast.images import ImageError, load_image, to_tensor
from dsd_fast.images.batch import ahead
from dsd_fast.jobs import read_tensors, row_id, write_tensors

Features = Callable[[Tensor], Tensor]
"""From (n, 3, H, W) pixels in [−1, 1] to (n, D)."""

# What a process that dies loses is a part at most.
_PART = 256
_TOGETHER = 32
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
        features: of images of one size, which are given a few at a time.
        about: digest of all that changes them.
        folder: of parts of some images each, ``00000.safetensors``, …

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
    loaded = enumerate(ahead(_load, files, workers=_LOADERS, read_ahead=2 * _TOGETHER, name="dsd-decode"))
    for size, group in groupby(loaded, key=lambda each: getattr(each[1], "shape", None)):
        if size is None:
            errors |= {str(place): str(error) for place, error in group}
            continue
        for batch in iter(partial(lambda images: list(islice(images, _TOGETHER)), iter(group)), []):
            places, images = zip(*batch, strict=True)
            with torch.no_grad():
                rows = features(torch.stack(images)).float().cpu()
            for place, row in zip(places, rows, strict=True):
                found[place] = row
                if not row.isfinite().all():
                    errors[str(place)] = f"{files[place]}: features that are no finite numbers"
    width = len(next(iter(found.values()))) if found else 0
    rows = torch.full((len(files), width), torch.nan, dtype=torch.float32, device="cpu")
    for place, row in found.items():
        if str(place) not in errors:
            rows[place] = row
    return rows, errors


def _load(file: os.PathLike[str]) -> Any:
    """Pixels of the image's own size, or the error."""
    try:
        image = load_image(file)
    except ImageError as error:
        return error
    return to_tensor(image, (image.height, image.width))
