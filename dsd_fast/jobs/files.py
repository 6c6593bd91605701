"""Files that appear whole or not at all."""

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


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
    with renaming(path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp"), path) as file:
        yield file
    sync_folder(path.parent)


@contextmanager
def renaming(temporary: Path, path: Path) -> Iterator[BinaryIO]:
    """A new file `temporary`, which takes the name `path` when the block ends; after an exception it is gone.

    Its content is on the disk by then; its name is once :func:`sync_folder` was called with the folder of `path`.

    Raises:
        OSError: `temporary` is there, a folder cannot be written, or the disk is full.
    """
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


def remove_stale(path: Path) -> None:
    """Removes what writers of `path` that were killed inside :func:`replacing` have left beside it.

    A living writer's file cannot be told from a dead one's, so only call this behind a lock that every writer of
    `path` takes.

    Raises:
        OSError: the folder cannot be read or written.
    """
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    for file in list(path.parent.iterdir()):
        if ours.fullmatch(file.name):
            file.unlink()


def sync_folder(folder: Path) -> None:
    """Makes the names of the files in a folder last; file systems that cannot are left alone.

    Raises:
        OSError: the folder cannot be read, or the disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
