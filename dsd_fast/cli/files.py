"""The folder of a command's results: writable, or one sentence; files in it that come and go together."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsd_fast.cli.terminal import CommandError
from dsd_fast.jobs import sync_folder


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Makes the folder `out`; inside, nothing but results is written, so a refusal of the system is one of theirs.

    After an exception a folder that was made for nothing is gone.

    Raises:
        CommandError: `out` cannot be written.
    """
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror or error
        raise CommandError(f"--out {out} cannot be written: {reason}") from error
    finally:
        if new:
            # It says itself whether there is something in it.
            with suppress(OSError):
                out.rmdir()


def check_folder(out: Path) -> None:
    """Refuses a folder that cannot be written, before there is anything to write; nothing is made.

    Raises:
        CommandError: it cannot.
    """
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise CommandError(f"--out {out} cannot be written: {'it' if there == out else there} is a file")
    if not os.access(there, os.W_OK):
        raise CommandError(f"--out {out} cannot be written: {os.strerror(errno.EACCES)}")


@contextmanager
def replacing_files(folder: Path, ours: re.Pattern[str]) -> Iterator[Path]:
    """Gives a folder to write files into, which move to `folder` when the block ends.

    They take the place of all files there that `ours` names; others stay. After an exception nothing has changed. One
    process at a time may do this: what one that was killed has left is removed.

    Raises:
        OSError: the folder cannot be written; before the block where `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    # A link may lead to another disk, where files cannot move to from here.
    folder = folder.resolve()
    for stale in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
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
    """Removes a file when the block ends; after an exception it stays."""
    yield
    if path.is_file():
        path.unlink()


def _remove_others(folder: Path, ours: re.Pattern[str], kept: set[str]) -> None:
    for file in list(folder.iterdir()):
        if file.is_file() and ours.fullmatch(file.name) and file.name not in kept:
            file.unlink()
    if any(folder.iterdir()):
        sync_folder(folder)
    else:
        folder.rmdir()
