"""Pictures, good and bad, and the command line in this process or in one of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dsd_fast.cli.app import app
from tests.images.files import SIGNATURE, chunk, encoded, picture, png
from tests.repository.source import ROOT

CAPTIONS = ["a red circle", "a small blue square left of a green ring", "a red circle", "a photo of the digit three"]


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Runs a command in this process, in an empty folder and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


def start(*arguments, cwd, **options):
    """A process of its own that runs a command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "dsd_fast.cli", *map(str, arguments)],
        cwd=cwd,
        env={**environment, **options},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="session")
def good_images(tmp_path_factory) -> list[Path]:
    """Pictures of every kind that is unusual and legal."""
    folder = tmp_path_factory.mktemp("good")
    first, second = (Image.fromarray(picture(seed=seed)) for seed in (0, 1))
    grey = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    files = {
        "plain.png": encoded(first, "PNG"),
        "animated.png": encoded(first, "PNG", save_all=True, append_images=[second]),
        "animated.webp": encoded(first, "WEBP", save_all=True, append_images=[second], lossless=True),
        "sixteen-bit.png": encoded(Image.fromarray(grey), "PNG"),
        "palette.png": encoded(second.quantize(16), "PNG"),
        "rotated.jpg": encoded(first, "JPEG", exif=rotated),
    }
    return _written(folder, files)


@pytest.fixture(scope="session")
def bad_images(tmp_path_factory) -> dict[Path, str]:
    """Eight files that cannot be used, each with the reason that says why."""
    folder = tmp_path_factory.mktemp("bad")
    whole = encoded(Image.fromarray(picture()), "JPEG")
    damaged = png(40, 30)
    damaged = damaged[: -len(chunk(b"IEND", b""))] + chunk(b"IDAT", b"no deflate stream") + chunk(b"IEND", b"")
    assert damaged.startswith(SIGNATURE)
    files = {
        "truncated.jpg": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.png": b"dear diary",
        "huge.png": png(60_000, 60_000),
        "picture.bmp": encoded(Image.fromarray(picture()), "BMP"),
        "corrupt.png": damaged,
    }
    reasons = ["truncated", "empty", "unsupported-format", "too-large", "unsupported-format", "corrupt"]
    bad = dict(zip(_written(folder, files), reasons, strict=True))
    return {**bad, folder / "missing.png": "missing", folder: "is-directory"}


def _written(folder: Path, files: dict[str, bytes]) -> list[Path]:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]
