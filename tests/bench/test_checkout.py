"""Suites outside the wheel: found where the package runs from a checkout, whatever else is importable."""

import json
import sys

import pytest

from dsd_fast.bench import UnavailableError, checkout
from dsd_fast.bench.suites import SUITES
from tests.repository.processes import run_python
from tests.repository.source import ROOT

BESIDE_OTHERS = """
import json, sys
import benchmarks
before = list(sys.path)
from dsd_fast.bench.suites import SUITES
suites = [SUITES[name]() for name in ("mini-card", "feature-quality", "fit")]
print(json.dumps([benchmarks.OTHER, sys.path == before, [[suite.name, suite.cases[-1].name] for suite in suites]]))
"""


def test_experiments_are_found_beside_another_package_of_that_name(tmp_path):
    (tmp_path / "other/benchmarks").mkdir(parents=True)
    (tmp_path / "other/benchmarks/__init__.py").write_text("OTHER = True\n")
    done = run_python(["-P", "-c", BESIDE_OTHERS], cwd=tmp_path, path=[tmp_path / "other", ROOT])
    last = [["mini-card", "parts/judge"], ["feature-quality", "shift-tells"], ["fit", "batch-mean"]]
    assert json.loads(done.stdout) == [True, True, last]


@pytest.mark.parametrize("name", ["feature-quality", "mini-card"])
def test_without_a_checkout_they_say_where_they_are(tmp_path, monkeypatch, name):
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    monkeypatch.delitem(sys.modules, "benchmarks.suites", raising=False)
    with pytest.raises(UnavailableError, match=r"^experiments are in the folder benchmarks/suites of the repository, "):
        SUITES[name]()
