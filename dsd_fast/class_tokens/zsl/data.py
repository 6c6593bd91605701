"""Data sets of zero-shot learning, and those in folders of images."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

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
_NUMBER = re.compile(r"^\d+\.(?!\d)\s*")


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
        own = np.flatnonzero(self.seen).tolist()
        if chosen is None and not self.validation:
            chosen = max(2, round(len(own) * (~self.seen).mean()))
        if chosen is None:
            classes = list(self.validation)
        elif isinstance(chosen, int):
            classes = sorted(own, key=lambda c: row_id("validation", str(seed), self.names[c]))[:chosen]
        else:
            named = {self.names[c]: c for c in own}
            found = [name if name in named else readable(name) for name in chosen]
            for name, meant in zip(chosen, found, strict=True):
                if meant not in named:
                    raise ValueError(f"validation: {name!r} is no seen class; there are {', '.join(named)}")
            classes = list({named[name] for name in found})
        if not 2 <= len(classes) <= len(own) - 2:
            raise ValueError(
                f"validation: got {len(classes)} of {len(own)} seen classes, expected at least two, and two others; "
                "or 0, without which λ is 0"
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
