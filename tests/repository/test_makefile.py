"""What `make` would do: set up when something changed, and only then."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.repository.source import ROOT

CPU = "https://download.pytorch.org/whl/cpu"
KERNEL = "csrc/cross_attention_score/cpu/kernel.h"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("Makefile", "constraints.txt", "constraints-oldest.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    return tmp_path


def install(tree: Path, index: str = "") -> None:
    """Leaves the mark of a finished set-up, newer than its inputs."""
    (tree / ".venv").mkdir()
    (tree / ".venv/installed").write_text(index + "\n")
    later = time.time() + 10
    os.utime(tree / ".venv/installed", (later, later))


def make(tree: Path, *arguments: str) -> list[str]:
    """Lines that `make` would run."""
    # Without what a surrounding make hands on: its flags and its command-line variables.
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=True
    )
    return [" ".join(line.split()) for line in done.stdout.splitlines()]


def test_first_run_sets_up(tree):
    lines = make(tree, "test")
    assert "python3 -m venv .venv" in lines
    pip = [line for line in lines if " pip " in line]
    assert pip == [
        ".venv/bin/python -m pip install -c constraints.txt setuptools wheel",
        ".venv/bin/python -m pip install -c constraints.txt torch==2.13.0",
        '.venv/bin/python -m pip install -c constraints.txt --no-build-isolation -e ".[dev]"',
    ]
    assert lines[-1] == ".venv/bin/python -m pytest -n 2 --dist worksteal"
    assert make(tree, "test", "PROCESSES=5", "ARGS=-x")[-1] == ".venv/bin/python -m pytest -n 5 --dist worksteal -x"


@pytest.mark.parametrize("target", ["test", "demo", "lint", "bench", "gpu"])
def test_later_runs_do_not_set_up(tree, target):
    install(tree)
    assert not [line for line in make(tree, target) if "pip" in line or "venv .venv" in line]


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml", "setup.py", KERNEL])
def test_changed_inputs_set_up_again(tree, name):
    install(tree, CPU)
    later = time.time() + 20
    os.utime(tree / name, (later, later))
    lines = make(tree, "test")
    assert "python3 -m venv .venv" in lines
    # The index chosen before is kept.
    assert f".venv/bin/python -m pip install -c constraints.txt --no-deps --index-url {CPU} torch==2.13.0" in lines


@pytest.mark.parametrize(("before", "now"), [("", CPU), (CPU, "https://example.com/other"), (CPU, "")])
def test_another_index_means_a_new_environment(tree, before, now):
    install(tree, before)
    lines = make(tree, "test", f"TORCH_INDEX={now}")
    assert "python3 -m venv --clear .venv" in lines
    assert f'echo "{now}" > .venv/installed' in lines
    assert not [line for line in make(tree, "test", f"TORCH_INDEX={before}") if "pip" in line]


def test_bench_measures_a_suite_and_makes_the_documents(tree):
    install(tree)
    documents = ".venv/bin/dsd-fast bench-docs"
    assert make(tree, "bench") == [".venv/bin/dsd-fast bench match", documents]
    assert make(tree, "bench", "SUITE=other", "ARGS=--threads 2")[0] == ".venv/bin/dsd-fast bench other --threads 2"


GPU = {
    "gpu": "-m benchmarks.gpu -- -k x",
    "gpu-full": "-m benchmarks.gpu --full",
    "gpu-sanitize": "-m benchmarks.gpu --sanitize -- -k x",
}


@pytest.mark.parametrize("target", GPU)
def test_gpu_uses_a_given_interpreter_as_it_is(tree, target):
    assert make(tree, target, "PYTHON=python3", "ARGS=-k x") == [f"python3 {GPU[target]}"]
    lines = make(tree, target, "ARGS=-k x")
    assert lines[-1] == f".venv/bin/python {GPU[target]}"
    assert any("pip install" in line for line in lines)
    install(tree)
    assert make(tree, target, "ARGS=-k x") == [f".venv/bin/python {GPU[target]}"]


def test_the_oldest_versions_have_an_environment_of_their_own(tree):
    lines = make(tree, "test-oldest", "ARGS=-x")
    assert "python3 -m venv .venv-oldest" in lines
    pip = [line for line in lines if " pip " in line]
    assert pip[:2] == [
        ".venv-oldest/bin/python -m pip install -c constraints-oldest.txt setuptools wheel",
        ".venv-oldest/bin/python -m pip install -c constraints-oldest.txt torch==2.11.0",
    ]
    assert pip[2].startswith(
        ".venv-oldest/bin/python -m pip install -c constraints-oldest.txt --no-build-isolation -e "
    )
    assert not [line for line in lines if ".venv/" in line]
    assert lines[-1].startswith(".venv-oldest/bin/python -m pytest -n 2 --dist worksteal tests/kernels ")
    assert lines[-1].endswith(" -x")


def test_another_index_means_a_new_oldest_environment_too(tree):
    install(tree, CPU)
    (tree / ".venv-oldest").mkdir()
    (tree / ".venv-oldest/installed").write_text("\n")
    later = time.time() + 10
    os.utime(tree / ".venv-oldest/installed", (later, later))
    lines = make(tree, "test-oldest")
    assert "python3 -m venv --clear .venv-oldest" in lines
    assert any(f"--index-url {CPU} torch==2.11.0" in line for line in lines)
    assert make(tree, "test-oldest", "TORCH_INDEX=")[0].startswith(".venv-oldest/bin/python -m pytest")


def test_the_newest_versions_are_not_constrained_and_without_cuda(tree):
    lines = make(tree, "test-newest", "ARGS=-x", "NEWEST_INDEX=https://example.com/cpu")
    assert "python3 -m venv --clear .venv-newest" in lines
    pip = [line for line in lines if " pip " in line]
    assert pip[0] == ".venv-newest/bin/python -m pip install --upgrade setuptools wheel"
    assert " pip index versions torch --retries 1 --extra-index-url https://example.com/cpu " in pip[1]
    # Not what torch needs: a whole index that does not answer would be asked for each of it.
    assert pip[2].endswith(' install --no-deps --retries 1 --extra-index-url https://example.com/cpu "torch==$version"')
    assert pip[3].startswith('.venv-newest/bin/python -m pip install --no-build-isolation -e ".[triton]" pytest ')
    assert not [line for line in lines if "constraints" in line]
    assert lines[-1] == ".venv-newest/bin/python -m pytest -n 2 --dist worksteal -m newest -x"


def test_the_newest_build_for_cpus_is_taken(tree):
    """What the shell makes of pip's answer."""
    (line,) = [line for line in make(tree, "install-newest") if "awk" in line]
    known = (
        "torch (2.15.0)\nAvailable versions: 2.15.0, 2.14.1+cpu, 2.14.1, 2.13.0+cpu, 2.13.0\n  INSTALLED: 2.11.0+cpu\n"
    )
    command = line[line.index("awk") : line.index(");")]
    assert subprocess.run(["bash", "-c", command], input=known, capture_output=True, text=True).stdout == "2.14.1+cpu\n"


def test_ci_runs_the_tests_with_the_pinned_the_oldest_and_the_newest_versions():
    run = ROOT / ".ci/run"
    assert os.access(run, os.X_OK)
    lines = run.read_text().splitlines()
    lanes = ["for versions in oldest newest; do", '  if make "install-$versions"; then', '    make "test-$versions"']
    assert lines.index("make test") < lines.index(lanes[0])
    assert lines[lines.index(lanes[0]) :][:3] == lanes
    assert "set -euo pipefail" in lines
