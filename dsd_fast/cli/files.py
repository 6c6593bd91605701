"""Files that appear whole or not at all."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dsd_fast.cli.terminal import CommandError


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Makes the folder `out`; inside, nothing but results is written, so a refusal of the system is one of theirs.

    Raises:
        CommandError: `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror or error
        raise CommandError(f"--out {out} cannot be written: {reason}") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the name `path` when the block ends; after an exception nothing has changed.

    The content goes to another name in the same folder, is forced to the disk, and is then renamed.

    Raises:
        OSError: the folder cannot be written, or the disk is full; before the block where that can be known.
    """
    if path.is_dir():
        # Only the rename at the end would notice.
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    file = temporary.open("xb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def replacing_files(folder: Path, ours: re.Pattern[str]) -> Iterator[Path]:
    """A folder to write files into, which move to `folder` when the block ends; after an exception nothing has changed.

    They take the place of all files there whose names `ours` matches; others stay.

    Raises:
        OSError: the folder cannot be written; before the block where `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    # A link may lead to another disk, where files cannot move to from here.
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        names = {file.name for file in temporary.iterdir()}
        if names:
            folder.mkdir(exist_ok=True)
        for name in sorted(names):
            os.replace(temporary / name, folder / name)
        if folder.is_dir():
            _remove_others(folder, ours, names)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def removing(path: Path) -> Iterator[None]:
    """A file that is removed when the block ends; after an exception it stays."""
    yield
    if path.is_file():
        path.unlink()


def _remove_others(folder: Path, ours: re.Pattern[str], kept: set[str]) -> None:
    for file in list(folder.iterdir()):
        if file.is_file() and ours.fullmatch(file.name) and file.name not in kept:
            file.unlink()
    if any(folder.iterdir()):
        _sync_folder(folder)
    else:
        folder.rmdir()


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself last; file systems that cannot are left alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
