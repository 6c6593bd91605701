"""A case under pytest-benchmark."""

import json
import os
import subprocess
import sys
from unittest import SkipTest

import pytest

from dsd_fast.bench import Case, Context, UnavailableError
from dsd_fast.bench.fixture import run_side, sides
from dsd_fast.bench.suites import SUITES
from tests.bench.tiny_suite import suite
from tests.repository.source import ROOT

FILE = """
import pytest
from dsd_fast.bench.fixture import run_side, sides
from tests.bench.tiny_suite import suite

@pytest.mark.parametrize("side", sides(suite()), ids=str)
def test_tiny(benchmark, context, side):
    run_side(benchmark, side, context)
"""


def pytest_run(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Whatever runs this test, the process is no worker of pytest-xdist, in which nothing is measured.
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", *arguments]
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


def test_sides_are_those_of_the_cases_of_speed():
    names = ["product/8", "product/4", "wrong", "error", "ladder"]
    assert [str(side) for side in sides(suite())] == [f"{n}-{s}" for n in names for s in ("baseline", "subject")]


def test_one_case_through_pytest_benchmark(tmp_path):
    (tmp_path / "test_tiny.py").write_text(FILE)
    (tmp_path / "conftest.py").write_text((ROOT / "benchmarks/conftest.py").read_text())
    options = ["--rootdir", tmp_path, "--benchmark-json", "out.json", "-k", "product/8 or wrong", "--threads", "1"]
    done = pytest_run(*options, tmp_path, cwd=tmp_path)
    assert "2 failed, 2 passed, 6 deselected" in done.stdout, done.stdout + done.stderr
    assert "RefusedError: at once: largest difference is 1, more than 1e-05, against one by one" in done.stdout
    found = {each["param"]: each for each in json.loads((tmp_path / "out.json").read_text())["benchmarks"]}
    assert set(found) == {"product/8-baseline", "product/8-subject"}
    for name, side, batch in (("baseline", "one by one", 1), ("subject", "at once", 8)):
        each = found[f"product/8-{name}"]
        assert each["extra_info"] == {"side": side, "batch": batch, "items": 8, "item": "row", "rows": 8}
        assert (each["group"], each["stats"]["rounds"]) == ("product/8", 7)


def test_the_suites_cases_are_collected():
    done = pytest_run("benchmarks", "--collect-only", "-q", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("features", "match", "ops", "unet"):
        for side in sides(SUITES[name]()):
            assert f"benchmarks/test_suites.py::test_suites[{name}/{side}]\n" in done.stdout


def test_what_cannot_be_run_here_is_skipped(tmp_path):
    done = pytest_run("benchmarks", "-k", "ops/elementwise/geglu/forward/320x64", "-rs", cwd=ROOT)
    assert "2 skipped" in done.stdout, done.stdout + done.stderr
    assert "it is for cuda" in done.stdout


def test_a_case_that_lacks_something_is_skipped():
    def missing(context):
        raise UnavailableError("no library for it")

    (baseline, _) = sides(suite(case=Case("missing", "product", missing)))[-2:]
    with pytest.raises(SkipTest, match="no library for it"):
        run_side(None, baseline, Context())
