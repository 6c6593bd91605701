"""Data sets of zero-shot learning: folders of images, and the proposed splits of Xian et al. 2019."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsd_fast.engine.items import read_source
from dsd_fast.generation.grids import read_classes
from dsd_fast.images.batch import ahead
from dsd_fast.jobs import row_id

Names = Sequence[str] | os.PathLike[str]
"""Names of classes, or a file of one a line."""

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
_READERS = 8
_SHOWN = 3
# Of the names of CUB's classes and of Caltech's folders, "001.Black_footed_Albatross".
_NUMBER = re.compile(r"\d+\.\s*")
_MATRICES = {
    "res101.mat": ("labels", "image_files"),
    "att_splits.mat": ("allclasses_names", "trainval_loc", "val_loc", "test_seen_loc", "test_unseen_loc"),
}


@dataclass(frozen=True, eq=False)
class ZslData:
    """Images of seen and unseen classes.

    Attributes:
        root: of the files.
        files: (N,) paths below it, with "/".
        labels: (N,) class of each.
        names: (C,) of the classes.
        seen: (C,) bool, the classes that have training images.
        train: (N,) bool, images of seen classes to learn from; all others are test images.
        validation: seen classes that λ and γ are chosen on.
    """

    root: Path
    files: tuple[str, ...]
    labels: NDArray[np.intp]
    names: tuple[str, ...]
    seen: NDArray[np.bool_]
    train: NDArray[np.bool_]
    validation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise ValueError(f"names: {twice[0]!r} is the name of several classes, expected one")
        of_seen = self.seen[self.labels]
        if (self.train & ~of_seen).any():
            wrong = self.files[(self.train & ~of_seen).argmax()]
            raise ValueError(f"images: {wrong} is a training image of a class that has none, an unseen one")
        # Of single seen classes test images may be missing: they count in no mean.
        for what, own, needed in (("seen", self.seen, self.train), ("unseen", ~self.seen, ~self.train)):
            if own.sum() < 2:
                raise ValueError(f"images: there are {own.sum()} {what} classes, expected at least two")
            lacking = own & (np.bincount(self.labels[needed], minlength=len(own)) == 0)
            if lacking.any():
                raise ValueError(f"images: there are none of the {what} class {self.names[lacking.argmax()]!r}")
        if not (~self.train & of_seen).any():
            raise ValueError("images: there are no test images of seen classes")

    @property
    def unseen_names(self) -> list[str]:
        """The names of the unseen classes, in order."""
        return [self.names[c] for c in np.flatnonzero(~self.seen)]

    def digests(self) -> list[str]:
        """Tell (N,) digests of the files' contents; of one that cannot be read, of its path."""
        read = ahead(partial(_digest, self.root), self.files, workers=_READERS, read_ahead=64, name="dsd-read")
        return list(read)

    def of(self, images: Sequence[int]) -> ZslData:
        """Take some of the images alone.

        Raises:
            ValueError: a class is left without images.
        """
        files = tuple(self.files[i] for i in images)
        return replace(self, files=files, labels=self.labels[images], train=self.train[images])

    def validated(self, chosen: int | Sequence[str] | None, seed: int) -> ZslData:
        """Choose the classes that λ and γ are chosen on.

        Args:
            chosen: how many, drawn by (seed, name); or their names; None: the data set's own, else as large a share of
                the seen classes as the unseen ones are of all, and at least two.

        Raises:
            ValueError: names that are no seen classes; fewer than two, or fewer than two other seen classes.
        """
        if chosen is None:
            if self.validation:
                return self
            chosen = max(2, round(self.seen.sum() * (~self.seen).mean()))
        own = np.flatnonzero(self.seen).tolist()
        if isinstance(chosen, int):
            classes = sorted(own, key=lambda c: row_id("validation", str(seed), self.names[c]))[:chosen]
        else:
            named = {self.names[c]: c for c in own}
            wrong = [name for name in chosen if readable(name) not in named]
            if wrong:
                raise ValueError(f"validation: {wrong[0]!r} is no seen class; there are {', '.join(named)}")
            classes = [named[readable(name)] for name in chosen]
        if not 2 <= len(classes) <= len(own) - 2:
            raise ValueError(
                f"validation: got {len(classes)} of {len(own)} seen classes, expected at least two, and two others"
            )
        return replace(self, validation=tuple(sorted(classes)))

    def held_out(self, share: float, seed: int) -> ZslData:
        """Make of the seen classes the task on which λ and γ are chosen: the validation classes are its unseen ones.

        Args:
            share: of the training images of the others that are its test images, at least one where there are two.
            seed: of which.
        """
        classes, images = np.flatnonzero(self.seen), np.flatnonzero(self.train)
        files = tuple(self.files[i] for i in images)
        labels = np.searchsorted(classes, self.labels[images])
        seen = ~np.isin(classes, self.validation)
        train = seen[labels] & ~drawn(files, labels, share, seed)
        return ZslData(self.root, files, labels, tuple(self.names[c] for c in classes), seen, train)


def read_folders(
    images: str | os.PathLike[str],
    unseen: Names | None = None,
    names: Names | None = None,
    *,
    share: float = 0.2,
    seed: int = 0,
) -> ZslData:
    """Read folders with one folder of images for each class.

    With ``train`` and ``test`` in ``images`` (``train/<class>/…``) the classes of ``train`` are the seen ones, and
    those that ``test`` has beside them the unseen ones; classes of ``val``, if there is one, are seen too, and the
    validation classes. Else ``images`` has the classes' folders itself.

    Args:
        unseen: of the second kind the folders of the unseen classes.
        names: (C,) of the classes, in the order of their folders' names; None: those, :func:`readable`.
        share: of the second kind the part of a seen class's images that are test images.
        seed: of which.

    Raises:
        ValueError: folders, classes or images that are missing.
    """
    root = Path(images)
    if not root.is_dir():
        raise ValueError(f"images: {root} is no folder")
    parts = [part for part in ("train", "val", "test") if (root / part).is_dir()]
    if "train" not in parts:
        return _one_folder(root, unseen, names, share, seed)
    if unseen is not None:
        raise ValueError(f"unseen: given for {root}, whose folder train says which classes are seen; expected None")
    folders = {part: _folders(root / part) for part in parts}
    if "test" not in parts:
        raise ValueError(f"images: {root} has a folder train and no folder test")
    shared = set(folders["train"]) & set(folders.get("val", ()))
    if shared:
        raise ValueError(f"images: {root}/val has {min(shared)!r}, as train has; expected the validation classes alone")
    classes = sorted(set().union(*folders.values()))
    number = {name: c for c, name in enumerate(classes)}
    learned = {*folders["train"], *folders.get("val", ())}
    files: list[str] = []
    labels, train = [], []
    for part, own in folders.items():
        for name in own:
            found = _files(root, root / part / name)
            files += found
            labels += [number[name]] * len(found)
            train += [part != "test"] * len(found)
    return ZslData(
        root,
        tuple(files),
        np.array(labels, np.intp),
        _named(classes, names),
        np.array([name in learned for name in classes]),
        np.array(train),
        tuple(number[name] for name in folders.get("val", ())),
    )


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
    classes = (
        tuple(read_classes(names)) if names is not None else tuple(map(readable, _texts(values["allclasses_names"])))
    )
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


def drawn(files: Sequence[str], labels: NDArray[np.intp], share: float, seed: int) -> NDArray[np.bool_]:
    """Draw (N,) a share of each class's images by their names, at least one, and never all."""
    chosen = np.zeros(len(files), bool)
    order = np.array([row_id("held out", str(seed), file) for file in files])
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(own))), len(own) - 1)
        chosen[own[order[own].argsort()][:count]] = True
    return chosen


def readable(name: str) -> str:
    """A class's name as a text has it: without a number before it, "_" and "+" as spaces."""
    return " ".join(re.sub("[_+]", " ", _NUMBER.sub("", name, count=1)).split()) or name


def _one_folder(root: Path, unseen: Names | None, names: Names | None, share: float, seed: int) -> ZslData:
    if unseen is None:
        raise ValueError(f"unseen: {root} has no folder train; expected the folders of the unseen classes, or a file")
    classes, chosen = _folders(root), set(read_classes(unseen))
    missing = sorted(chosen - set(classes))
    if missing:
        raise ValueError(f"unseen: {root} has no folder {missing[0]!r}; there are {', '.join(classes[:_SHOWN])}, …")
    found = [_files(root, root / name) for name in classes]
    files = tuple(file for own in found for file in own)
    labels = np.repeat(np.arange(len(classes)), [len(own) for own in found])
    seen = np.array([name not in chosen for name in classes])
    train = seen[labels] & ~drawn(files, labels, share, seed)
    return ZslData(root, files, labels, _named(classes, names), seen, train)


def _named(classes: Sequence[str], names: Names | None) -> tuple[str, ...]:
    if names is None:
        return tuple(map(readable, classes))
    given = tuple(read_classes(names))
    if len(given) != len(classes):
        raise ValueError(f"names: got {len(given)} for {len(classes)} classes, expected one each")
    return given


def _folders(root: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"images: {root} has no folders, expected one for each class")
    return names


def _files(root: Path, folder: Path) -> list[str]:
    found = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in _ENDINGS and file.is_file()]
    if not found:
        raise ValueError(f"images: {folder} has no image, expected files that end in {', '.join(_ENDINGS)}")
    return [file.relative_to(root).as_posix() for file in found]


def _digest(root: Path, file: str) -> str:
    return read_source(root / file)[1][0]


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
    return [str(np.asarray(cell).ravel()[0]) for cell in np.asarray(cells).ravel()]


def _mapped(given: Iterable[str], root: Path) -> list[str]:
    """Paths below the root by the longest end of each that is there."""
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
    return found
