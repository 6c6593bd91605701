"""Caption files."""

import pytest

from dsd_fast.cli.match.captions import read_captions


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"one\rtwo", ["one", "two"]),
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
        (b"\n  one  \n\n\t\ntwo\n\n", ["one", "two"]),
        (b"one\none\n", ["one", "one"]),
        ("a \N{LINE SEPARATOR} b\x0cc \x85 d\n".encode(), ["a \N{LINE SEPARATOR} b\x0cc \x85 d"]),
        ("クマ\nours\n".encode(), ["クマ", "ours"]),
    ],
)
def test_lines_are_captions(tmp_path, content, captions):
    file = tmp_path / "captions.txt"
    file.write_bytes(content)
    assert read_captions(file) == captions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no captions"),
        (b"\xef\xbb\xbf\r\n \n", "has no captions"),
        ("café".encode("latin-1"), "is not UTF-8 text: byte 3 is wrong"),
        ("one\n".encode("utf-16"), "is not UTF-8 text: byte 0 is wrong"),
    ],
)
def test_a_file_without_captions_is_refused(tmp_path, content, message):
    file = tmp_path / "captions.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_captions(file)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_captions(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_captions(tmp_path)


def test_bad_files_on_the_command_line(cli, good_images, tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, message in (
        ("empty.txt", "has no captions"),
        ("latin.txt", "is not UTF-8"),
        ("no.txt", "cannot be read"),
    ):
        done = cli("match", good_images[0], "--captions", name, "--out", "out")
        assert done.exit_code == 2
        assert done.stderr.startswith(f"Error: --captions {name} {message}")
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
