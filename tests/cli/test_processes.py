"""The command as a process: light to start, interrupted, out of disk space."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dsd_fast import __version__
from dsd_fast.jobs import read_index
from tests.cli.conftest import start
from tests.repository.processes import run_python
from tests.repository.source import ROOT

HEAVY = ("torch", "diffusers", "transformers", "peft", "numpy", "pyarrow", "PIL")

RUN = """
import sys
from dsd_fast.cli import main
try:
    main()
finally:
    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["match", "--help"], ["--version"], ["match"]])
def test_start_is_light(arguments):
    done = run_python(["-c", RUN.format(heavy=HEAVY), *arguments], cwd=ROOT, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.returncode == (2 if arguments == ["match"] else 0)
    if arguments == ["--version"]:
        assert done.stdout == f"dsd-fast {__version__}\n"
    elif "--help" in arguments:
        assert "match" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "dsd_fast.cli", "--version"],
        ["-m", "dsd_fast.cli", "match", "--help"],
        # As a command prints what it has found.
        ["-c", "from dsd_fast.cli.terminal import *\nwith checked_stdout(), one_sentence(): print(1, flush=True)"],
        ["-c", "from dsd_fast.cli.terminal import *\nwith checked_stdout(): print(1)"],
    ],
)
def test_a_full_disk_under_stdout_is_one_sentence(arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == f"Error: stdout cannot be written: {os.strerror(errno.ENOSPC)}\n"
    assert done.returncode == 1


def test_a_reader_who_leaves_is_no_error():
    command = f"{sys.executable} -m dsd_fast.cli match --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 1)


def test_only_the_commands_own_words_are_printed(tmp_path):
    done = run_python(
        [
            "-m",
            "dsd_fast.cli",
            "demo",
            "--scenes",
            1,
            "--reference-scenes",
            1,
            "--timesteps",
            "500,",
            "--out",
            tmp_path,
        ],
        cwd=ROOT,
    )
    lines = done.stderr.splitlines()
    assert lines[0] == "loading mini"
    assert [line.split()[0] for line in lines[1:] if line] == ["official", "noise", "heat", "reference"]


def wait_for(stream, pattern):
    """Reads the stream up to a match of the pattern."""
    seen = ""
    while not re.search(pattern, seen):
        character = stream.read(1)
        assert character, seen
        seen += character
    return seen


def test_an_interrupted_run_keeps_what_was_scored(good_images, tmp_path):
    # Fewer than fit the matcher together, which would otherwise score them all before it gives one back.
    count = 1000
    (tmp_path / "in").mkdir()
    for number in range(count):
        # Equal files of other names are rows of their own.
        os.link(good_images[0], tmp_path / "in" / f"{number}.png")
    # FORCE_COLOR shows the progress although stderr is no terminal.
    process = start(
        "match", "in", "--caption", "a", "--caption", "b", "--timesteps", 2, "--out", "out",
        "--memory-budget", "8MiB", cwd=tmp_path, FORCE_COLOR="1", COLUMNS="120",
    )  # fmt: skip
    seen = wait_for(process.stderr, rf"[1-9]\d*/{count}")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, seen + stderr
    assert "Traceback" not in stdout + seen + stderr
    assert "not reached before the interruption" in stdout
    content = json.loads((tmp_path / "out/results.json").read_text())
    counts = content["counts"]
    assert content["complete"] is False
    assert 0 < counts["scored"] == len(content["images"]) < count
    assert counts["scored"] + counts["errors"] + counts["not_reached"] == counts["images"] == count
    table = pq.read_table(tmp_path / "out/scores.parquet")
    assert len(table) == 2 * counts["scored"]
    assert pq.read_metadata(tmp_path / "out/scores.parquet").metadata[b"dsd_fast.complete"] == b"false"
    assert len(read_index(tmp_path / "out")) == counts["scored"]


def test_an_interruption_before_the_first_score_leaves_nothing(good_images, tmp_path):
    process = start("match", good_images[0], "--caption", "a", "--out", "out", cwd=tmp_path)
    seen = wait_for(process.stderr, "loading mini\n")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, seen + stderr
    assert stderr == "Error: interrupted\n"
    assert stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_sentence(good_images, tmp_path):
    """A limit on the size of files stands in for a disk that is full."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    done = subprocess.run(
        [sys.executable, "-m", "dsd_fast.cli", "match", good_images[0], "--caption", "a", "--out", tmp_path / "out"],
        cwd=ROOT,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    safe = "0 rows are safe, and the same command goes on from there"
    out = tmp_path / "out"
    assert done.stderr.splitlines()[-1] == f"Error: --out {out} cannot be written: File too large; {safe}"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert not [path for path in out.iterdir() if not path.name.startswith(".lock")]
