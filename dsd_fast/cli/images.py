"""The images that a command is given, files and folders, and their prompts."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

from dsd_fast.cli.terminal import CommandError
from dsd_fast.images import ImageError, load_image

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class ImageFiles(Sequence[Path]):
    """Files as they are given, and those of folders and the folders in them; only their names are in memory.

    A file that is given itself counts whatever it is called. Of a folder those that end in .jpg, .jpeg, .png or .webp
    count, in the order of their names, files and folders together. Links to folders are not followed.

    Args:
        given: files and folders.
        without: a folder that is not searched, as that of the results.

    Attributes:
        names: of each its path below the folder given, or its file name, without the ending.

    Raises:
        CommandError: a folder that cannot be read, or no image at all.
    """

    def __init__(self, given: Sequence[Path], without: Path | None = None) -> None:
        left_out = None if without is None else os.path.realpath(without)
        self._paths: list[str] = []
        # Where the part below the folder begins.
        self._starts = array("L")
        for path in given:
            text = str(path)
            start = len(os.path.join(text, "")) if path.is_dir() else len(text) - len(path.name)
            for found in _below(text, left_out) if path.is_dir() else [text]:
                self._paths.append(found)
                self._starts.append(start)
        if not self._paths:
            folders = ", ".join(map(str, given))
            raise CommandError(f"{folders} has no image, expected files that end in {', '.join(ENDINGS)}")
        self.names: Sequence[str] = _Names(len(self), lambda number: os.path.splitext(self.below(number))[0])

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, number: int) -> Path: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Path]: ...
    def __getitem__(self, number: int | slice) -> Path | Sequence[Path]:
        if isinstance(number, slice):
            return [Path(path) for path in self._paths[number]]
        return Path(self._paths[number])

    def below(self, number: int) -> str:
        """Gives the path of an image below the folder that was given, or its file name where it was given itself."""
        return self._paths[number][self._starts[number] :]

    def prompts(self, given: Mapping[str, str], numbers: Iterable[int] | None = None) -> list[str]:
        """Finds each image's prompt: under its whole name, its path below the folder given, its file name or its stem.

        Args:
            numbers: of the images; all if None.

        Raises:
            CommandError: the first image that has none.
        """
        found = []
        for number in range(len(self)) if numbers is None else numbers:
            path = self[number]
            names = dict.fromkeys((str(path), self.below(number), path.name, path.stem))
            prompt = next((given[name] for name in names if name in given), None)
            if prompt is None:
                raise CommandError(f"--prompts: none for {path}, expected one under {' or '.join(names)}")
            found.append(prompt)
        return found


def decoding_error(path: Path) -> ImageError | None:
    """Tries to decode an image; returns what refuses it."""
    try:
        load_image(path)
    except ImageError as error:
        return error
    return None


def read_prompts(file: Path) -> dict[str, str]:
    """Reads name of an image → prompt from a table with the columns `image` and `prompt`.

    Raises:
        CommandError: another ending, no rows, or an image that has two prompts.
        ValueError: the file cannot be read, or something in it is wrong, by line.
    """
    from dsd_fast.jobs.tables import SUFFIXES, read_rows

    if file.suffix not in SUFFIXES:
        raise CommandError(f"--prompts {file} ends in {file.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    found: dict[str, str] = {}
    for row in read_rows(file, SUFFIXES[file.suffix]):
        name = row.text("image")
        # An empty prompt is one too.
        prompt = "" if row.values.get("prompt") == "" else row.text("prompt")
        if found.setdefault(name, prompt) != prompt:
            raise CommandError(f"{row.place}: the image {name!r} has another prompt before")
    if not found:
        raise CommandError(f"--prompts {file} has no rows, expected the columns image and prompt")
    return found


class _Names(Sequence[str]):
    """Texts that are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], str]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...
    def __getitem__(self, number: int | slice) -> str | Sequence[str]:
        if isinstance(number, slice):
            return [self._make(each) for each in range(self._count)[number]]
        return self._make(range(self._count)[number])


def _below(folder: str, left_out: str | None) -> Iterator[str]:
    if os.path.realpath(folder) == left_out:
        return
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except OSError as error:
        raise CommandError(f"{folder} cannot be read: {error.strerror or error}") from error
    for name, is_folder in found:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _below(path, left_out)
        elif name.lower().endswith(ENDINGS):
            yield path
