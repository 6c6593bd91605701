"""The proposed splits of Xian et al. 2019, "Zero-Shot Learning: A Comprehensive Evaluation of the Good, the Bad and the
Ugly", as their authors hand them out (xlsa17)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsd_fast.class_tokens.zsl.data import Names, ZslData, readable
from dsd_fast.generation.grids import read_classes

_MATRICES = {
    "res101.mat": ("labels", "image_files"),
    "att_splits.mat": ("allclasses_names", "trainval_loc", "val_loc", "test_seen_loc", "test_unseen_loc"),
}


def read_proposed(
    folder: str | os.PathLike[str], images: str | os.PathLike[str], names: Names | None = None
) -> ZslData:
    """Read the proposed splits: ``res101.mat`` and ``att_splits.mat`` of AWA1, AWA2, CUB, SUN or APY.

    Of ``res101.mat`` labels and paths are read, not the features: there are none of the images that are generated. The
    authors' absolute paths are found below ``images`` by as many of their last parts as there are. Validation classes
    are those of ``val_loc``.

    FLO has no such folder. Files of the same form that others have made of it are read where they have ``image_files``;
    they have no ``allclasses_names``, so that ``names`` must be given.

    Args:
        folder: of the two files.
        images: of the data set.
        names: (C,) of the classes in the order of the labels; None: the file's.

    Raises:
        ValueError: files that are missing or say something else; images that are not there.
        ImportError: scipy is not installed.
    """
    values: dict[str, Any] = {}
    for file, keys in _MATRICES.items():
        values |= _matrix(Path(folder) / file, keys)
    if "image_files" not in values:
        raise ValueError(
            f"proposed: {Path(folder) / 'res101.mat'} has no image_files, and its features alone are of no use: there "
            "are none of generated images; expected the proposed splits' own file, or folders of images"
        )
    labels = _numbers(values, "labels") - 1
    if names is None and "allclasses_names" not in values:
        raise ValueError(f"names: {Path(folder) / 'att_splits.mat'} has no allclasses_names; expected a file of names")
    classes = tuple(read_classes(list(map(readable, _texts(values["allclasses_names"]))) if names is None else names))
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"names: got {len(classes)} for labels from {labels.min() + 1} to {labels.max() + 1}")
    given = _texts(values["image_files"])
    if len(given) != len(labels):
        raise ValueError(f"proposed: there are {len(given)} image_files for {len(labels)} labels, expected one each")
    parts = {}
    for name in ("trainval_loc", "test_seen_loc", "test_unseen_loc"):
        parts[name] = _places(values, name, len(labels))
    counts = np.bincount(np.concatenate(list(parts.values())), minlength=len(labels))
    if counts.max() > 1:
        raise ValueError(f"proposed: image {counts.argmax() + 1} is in several of {', '.join(parts)}")
    seen = np.isin(np.arange(len(classes)), labels[parts["trainval_loc"]])
    for name, wanted in (("test_seen_loc", True), ("test_unseen_loc", False)):
        wrong = seen[labels[parts[name]]] != wanted
        if wrong.any():
            raise ValueError(
                f"proposed: {name} has images of {classes[labels[parts[name]][wrong][0]]!r}, whose class "
                f"is {'not ' if wanted else ''}in trainval_loc"
            )
    chosen = np.flatnonzero(counts)
    # Some labels have neither training nor test images.
    used = np.unique(labels[chosen])
    train = np.isin(chosen, parts["trainval_loc"])
    held = np.unique(labels[_places(values, "val_loc", len(labels))]) if "val_loc" in values else np.empty(0, np.intp)
    # Splits that hold images out, and no classes, say nothing of unseen ones.
    if len(held) >= seen.sum() - 1:
        held = np.empty(0, np.intp)
    root = Path(images)
    return ZslData(
        root,
        tuple(_mapped([given[i] for i in chosen], root)),
        np.searchsorted(used, labels[chosen]),
        tuple(classes[c] for c in used),
        seen[used],
        train,
        tuple(np.searchsorted(used, held).tolist()),
    )


def _matrix(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("the proposed splits need scipy: pip install 'dsd-fast[zsl]'") from error
    if not file.is_file():
        raise ValueError(f"proposed: {file} does not exist, expected a folder with {' and '.join(_MATRICES)}")
    try:
        values: dict[str, Any] = loadmat(file, variable_names=keys)
    except Exception as error:
        # Of a damaged file anything is raised.
        raise ValueError(f"proposed: {file} is no MATLAB file that can be read: {error}") from error
    return {key: value for key, value in values.items() if key in keys}


def _numbers(values: dict[str, Any], name: str) -> NDArray[np.intp]:
    if name not in values:
        raise ValueError(f"proposed: {name} is missing")
    given = np.asarray(values[name]).ravel()
    if not len(given) or not np.issubdtype(given.dtype, np.number) or (given != np.round(given)).any():
        raise ValueError(f"proposed: {name} has {given.dtype} {given.shape}, expected whole numbers")
    return given.astype(np.intp)


def _places(values: dict[str, Any], name: str, count: int) -> NDArray[np.intp]:
    """Positions of images, which the files count from 1."""
    places = _numbers(values, name) - 1
    if not 0 <= places.min() <= places.max() < count:
        raise ValueError(f"proposed: {name} has {places.min() + 1} to {places.max() + 1}, expected 1 to {count}")
    return places


def _texts(cells: Any) -> list[str]:
    """Texts of cells, which scipy has as arrays of one text each."""
    return ["".join(map(str, np.asarray(cell).ravel())) for cell in np.asarray(cells).ravel()]


def _mapped(given: Sequence[str], root: Path) -> list[str]:
    """Paths below the root by the longest end of each that is there, each of another file.

    Raises:
        ValueError: images that are not there; two that are one file.
    """
    found, missing = [], []
    for path in given:
        parts = [part for part in PurePosixPath(path.replace("\\", "/")).parts if part not in ("/", "..")]
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        there = next((end for end in ends if (root / end).is_file()), None)
        if there is None:
            missing.append(path)
        else:
            found.append(there)
    if missing:
        raise ValueError(
            f"images: {len(missing)} of {len(found) + len(missing)} images are not below {root}, the first "
            f"{missing[0]!r}, of which no end was found"
        )
    first: dict[str, str] = {}
    for path, end in zip(given, found, strict=True):
        # As of photographs with several objects, whose classes differ by the part that the authors looked at.
        if end in first:
            raise ValueError(
                f"images: the images {first[end]!r} and {path!r} are both {root / end}, expected a file for each"
            )
        first[end] = path
    return found
