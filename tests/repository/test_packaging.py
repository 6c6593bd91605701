"""What the wheel and the sdist hold, and that the wheel works without the source tree (promise 34)."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dsd_fast
from tests.repository.processes import run_python
from tests.repository.source import ROOT, python_files

# Reviewed: a file of the package that is not in this list is not meant to be shipped.
PACKAGED = (Path(__file__).parent / "packaged.txt").read_text().split()

# Made by the build: in wheels, not in sdists.
LIBRARIES = ["dsd_fast/_cpu.abi3.so"]

WHEEL_METADATA = ["METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"]
SDIST_EXTRA = [
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "PKG-INFO",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.cfg",
    "setup.py",
    *(str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()),
    *(
        f"dsd_fast.egg-info/{name}"
        for name in (
            "PKG-INFO",
            "SOURCES.txt",
            "dependency_links.txt",
            "entry_points.txt",
            "requires.txt",
            "top_level.txt",
        )
    ),
]


def copy_of_the_tree(folder: Path) -> Path:
    """What the build reads, in a folder of its own."""
    source = folder / "tree"
    source.mkdir()
    caches = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for name in ("csrc", "dsd_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=caches)
    for name in (
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "README.md",
        "constraints.txt",
        "pyproject.toml",
        "setup.py",
    ):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, built from a copy of the tree, and the wheel, built from the sdist."""
    source = copy_of_the_tree(tmp_path_factory.mktemp("source"))
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (sdist,), (wheel,) = source.glob("dist/*.tar.gz"), source.glob("dist/*.whl")
    return sdist, wheel


def difference(files: list[str], patterns: list[str]) -> dict[str, list[str]]:
    """Files that no pattern names, and patterns that name no file."""
    return {
        "not in the list": [file for file in files if not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)],
        "not in the archive": [pattern for pattern in patterns if not fnmatch.filter(files, pattern)],
    }


SAME = {"not in the list": [], "not in the archive": []}


def test_difference():
    assert difference(["a.py", "w/x/y.json"], ["a.py", "w/*"]) == SAME
    assert difference(["a.py", "b.txt"], ["a.py", "c.py"]) == {
        "not in the list": ["b.txt"],
        "not in the archive": ["c.py"],
    }


def test_wheel_holds_the_reviewed_files(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        files = wheel.namelist()
    info = f"dsd_fast-{dsd_fast.__version__}.dist-info"
    assert difference(files, [*PACKAGED, *LIBRARIES, *(f"{info}/{name}" for name in WHEEL_METADATA)]) == SAME
    assert "dsd_fast/py.typed" in files
    assert "dsd_fast/kernels/cross_attention_score/op.py" in files
    assert not [file for file in files if file.startswith("kernels/")]


def test_sdist_holds_the_reviewed_files(distributions):
    with tarfile.open(distributions[0]) as sdist:
        members = sdist.getmembers()
    assert not [member.name for member in members if member.issym()]
    root = f"dsd_fast-{dsd_fast.__version__}/"
    files = [member.name.removeprefix(root) for member in members if member.isfile()]
    assert difference(files, [*PACKAGED, *SDIST_EXTRA]) == SAME


def test_every_python_file_is_reviewed():
    files = [str(file.relative_to(ROOT)) for file in python_files("dsd_fast", "kernels")]
    files = [f"dsd_fast/{file}" if file.startswith("kernels/") else file for file in files]
    assert sorted(files) == sorted(name for name in PACKAGED if name.endswith(".py"))


def install(wanted: Path, folder: Path, *options: str) -> str:
    """Installs a wheel or a source tree into ``folder``; what pip and the build say."""
    options = ("--no-deps", "--no-index", "--no-build-isolation", *options)
    done = run_python(["-m", "pip", "install", *options, "--target", folder, wanted], cwd=folder.parent)
    return done.stdout + done.stderr


def assert_works(installed: Path, elsewhere: Path, backend: str) -> None:
    """Scores a pair by what is in the folder ``installed`` alone."""
    elsewhere.mkdir()
    shutil.copy(Path(__file__).parent / "smoke.py", elsewhere)
    run_python(["-P", elsewhere / "smoke.py", installed, backend], cwd=elsewhere, path=[installed])


def test_installed_wheel_works_without_the_source_tree(distributions, tmp_path):
    install(distributions[1], tmp_path / "installed")
    assert_works(tmp_path / "installed", tmp_path / "elsewhere", "cpu")


WARNING = "dsd_fast: without the compiled operators; plain PyTorch runs in their place"


def test_with_a_compiler_that_fails_the_package_installs_with_one_warning_and_works(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("CXX", "false")
    assert install(copy_of_the_tree(tmp_path), tmp_path / "installed", "--verbose").count(WARNING) == 1
    assert_works(tmp_path / "installed", tmp_path / "elsewhere", "reference")


@pytest.mark.parametrize("compiler", ["false", "/nonexistent/g++"], ids=["fails", "is missing"])
def test_where_the_compiler_fails_nothing_of_an_earlier_build_stays(tmp_path, monkeypatch, compiler):
    """It would be what other sources say. A CUDA compiler, whatever it is, is asked for nothing."""
    source = copy_of_the_tree(tmp_path)
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("CXX", compiler)
    stale = [source / "build/lib" / LIBRARIES[0], source / LIBRARIES[0]]
    for file in stale:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    command = ["setup.py", "build_ext", "--inplace", "--build-lib", "build/lib", "--force"]
    assert run_python(command, cwd=source).stdout.count(WARNING) == 1
    assert [file for file in [*stale, tmp_path / "called"] if file.exists()] == []


WHERE = (
    "experiments are in the folder benchmarks/suites of the repository, and the package does not run from a checkout of"
    " it (pip install -e .)"
)
OUTSIDE_A_CHECKOUT = [
    ("bench mini-card", 2, f"Error: suite 'mini-card': {WHERE}"),
    ("bench fit --only experiments", 0, f"experiments: left out, {WHERE}"),
    ("bench-docs", 2, "Error: --root .: it has no folder benchmarks: documents are made in a checkout"),
    ("bench-docs --root docs", 2, f"Error: {WHERE}"),
]


def test_installed_wheel_says_where_experiments_are(distributions, tmp_path):
    with zipfile.ZipFile(distributions[1]) as wheel:
        wheel.extractall(tmp_path)
    (tmp_path / "docs/benchmarks").mkdir(parents=True)
    for command, code, last in OUTSIDE_A_CHECKOUT:
        done = run_python(["-P", "-m", "dsd_fast.cli", *command.split()], cwd=tmp_path, path=[tmp_path], check=False)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (code, last)


def test_metadata_of_the_wheel(distributions):
    with zipfile.ZipFile(distributions[1]) as wheel:
        info = f"dsd_fast-{dsd_fast.__version__}.dist-info"
        text = wheel.read(f"{info}/METADATA").decode()
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "Name: dsd-fast\n" in text
    assert "License-Expression: Apache-2.0\n" in text
    assert "Requires-Python: >=3.11\n" in text
    assert set(re.findall(r"^Provides-Extra: (.*)$", text, re.MULTILINE)) == {
        "triton",
        "onnx",
        "onnx-gpu",
        "control",
        "data",
        "metrics",
        "ray",
        "zsl",
        "bench",
        "dev",
    }
    assert entry_points == "[console_scripts]\ndsd-fast = dsd_fast.cli:main\n"
