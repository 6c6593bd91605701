"""The folder of a command's results."""

import errno
import os

import pytest

from dsd_fast.cli.files import writing
from dsd_fast.cli.terminal import CommandError


def test_writing_names_the_folder(tmp_path):
    with writing(tmp_path / "a/b"):
        assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="file cannot be written: it is a file"), writing(tmp_path / "file"):
        pytest.fail("the block must not run")
    with pytest.raises(CommandError, match="cannot be written: No space left"), writing(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
