"""Files appear whole or not at all."""

import errno
import os
import stat
from contextlib import nullcontext

import pytest

from dsd_fast.jobs import remove_stale, replacing, sync_folder


def test_a_file_takes_its_name_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.txt"]
    # The permissions of an ordinary new file, not those of a private temporary one.
    (tmp_path / "b.txt").touch()
    assert path.stat().st_mode == (tmp_path / "b.txt").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_changes_nothing(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def write():
        with replacing(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_process_changes_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    child = os.fork()
    if not child:
        with replacing(path) as file:
            file.write(b"new")
            file.flush()
            os._exit(1)
    os.waitpid(child, 0)
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2
    remove_stale(path)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_writers_of_other_files_have_open_is_not_stale(tmp_path):
    path = tmp_path / "a[1].txt"
    path.touch()
    for name in (".a[1].txt.tmp", ".a[1].txt.12345678.tmp~", ".a1.txt.12345678.tmp"):
        (tmp_path / name).touch()
    with replacing(tmp_path / "b.txt") as file, replacing(tmp_path / "a[1].txt.12345678.tmp") as longer:
        file.write(b"b")
        longer.write(b"longer")
        before = set(os.listdir(tmp_path))
        (tmp_path / ".a[1].txt.12345678.tmp").touch()
        remove_stale(path)
        assert set(os.listdir(tmp_path)) == before
    assert (tmp_path / "b.txt").read_bytes() == b"b"


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), replacing(path) as file:
        file.write(b"new")
    assert os.listdir(tmp_path) == []


def test_first_the_content_then_the_name_then_the_folder_are_made_to_last(tmp_path, monkeypatch):
    path, calls = tmp_path / "a.txt", []
    fsync, rename = os.fsync, os.replace

    def synced(descriptor):
        of_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("folder" if of_folder else os.fstat(descriptor).st_size)
        fsync(descriptor)

    def renamed(source, target):
        calls.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with replacing(path) as file:
        file.write(b"new")
    assert calls == [3, path, "folder"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO], ids=["cannot", "fails"])
def test_a_file_system_that_cannot_sync_folders_is_left_alone(tmp_path, monkeypatch, code):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output") if code == errno.EIO else nullcontext():
        sync_folder(tmp_path)


def test_a_folder_in_the_way_is_known_at_once(tmp_path):
    with pytest.raises(IsADirectoryError), replacing(tmp_path):
        pytest.fail("the block must not run")
