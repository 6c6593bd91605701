"""What a fresh process finds after importing the package (promises 29 and 33)."""

import json
from pathlib import Path

import pytest

import dsd_fast
from tests.repository.processes import run_python
from tests.repository.source import ROOT

HEAVY = ("torch", "triton", "diffusers", "transformers", "peft", "numpy", "PIL", "pyarrow")

# Imports a module, then prints the seconds it took and which of the heavy packages came with it.
IMPORT = """
import importlib, json, sys, time
start = time.perf_counter()
importlib.import_module(sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps([seconds, [name for name in sys.argv[2:] if name in sys.modules]]))
"""

AVAILABLE = """
import diffusers.utils, json, transformers.utils
print(json.dumps([diffusers.utils.is_kernels_available(), bool(transformers.utils.is_kernels_available())]))
"""


def import_fresh(module: str) -> tuple[float, list[str]]:
    seconds, loaded = json.loads(run_python(["-c", IMPORT, module, *HEAVY], cwd=ROOT).stdout)
    return seconds, loaded


@pytest.mark.alone
def test_import_dsd_fast_loads_nothing_heavy():
    seconds, loaded = import_fresh("dsd_fast")
    assert loaded == []
    assert seconds < 2


def test_import_of_rooms_loads_no_triton():
    # diffusers itself imports Triton where it is installed, so these rooms may import diffusers only when they run.
    code = "import dsd_fast.kernels, dsd_fast.diffusion, dsd_fast.images, dsd_fast.models"
    code += f"; import json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    loaded = json.loads(run_python(["-c", code], cwd=ROOT).stdout)
    assert {"triton", "diffusers", "transformers"}.isdisjoint(loaded)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import dsd_fast.matching, dsd_fast.unet
from dsd_fast.kernels.cross_attention_score import cross_attention_score
_, score = cross_attention_score(torch.zeros(1, 4, 16), torch.zeros(1, 3, 16), heads=2, mean=True)
print(score.exp().tolist(), sorted({"diffusers", "transformers"} & sys.modules.keys()))
"""


def test_rooms_that_launch_kernels_import_where_triton_is_missing():
    # Where it is installed their import may load it: torch.utils.flop_counter, which holds FLOP formulas, does.
    scores, loaded = run_python(["-c", WITHOUT_TRITON], cwd=ROOT).stdout.split("]] ")
    assert json.loads(scores + "]]")[0] == pytest.approx([3, 3])
    assert loaded == "[]\n"


def test_public_names_load_lazily():
    assert set(dsd_fast.__all__) <= set(dir(dsd_fast))
    for name in dsd_fast.__all__:
        assert getattr(dsd_fast, name) is getattr(dsd_fast, name)
    assert dsd_fast.Matcher.__module__.startswith("dsd_fast.matching")
    assert dsd_fast.load.__module__.startswith("dsd_fast.models")
    with pytest.raises(AttributeError, match="module 'dsd_fast' has no attribute 'Matchr'"):
        _ = dsd_fast.Matchr


@pytest.fixture
def other_kernels(tmp_path: Path) -> Path:
    """A folder in which a distribution named `kernels` is installed."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("OTHER = True\n")
    (tmp_path / "kernels-0.99.dist-info").mkdir()
    (tmp_path / "kernels-0.99.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.99\n")
    (tmp_path / "kernels-0.99.dist-info/RECORD").write_text("kernels/__init__.py,,\n")
    return tmp_path


@pytest.mark.parametrize("first", ["kernels", "dsd_fast.kernels.common"])
def test_kernels_is_not_shadowed(other_kernels, first):
    # At the root, sys.path starts with the folder that holds our own kernels/.
    code = f"import {first}, kernels, dsd_fast.kernels.common as ours; print(kernels.OTHER, ours.__file__)"
    printed = run_python(["-c", code], cwd=ROOT, path=[other_kernels]).stdout.split()
    assert printed[0] == "True"
    assert Path(printed[1]).resolve() == ROOT / "kernels/common/__init__.py"


def test_availability_of_kernels_is_what_it_is_without_us(other_kernels, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    at_root = ["-c", f"import dsd_fast.kernels.common\n{AVAILABLE}"]
    without = json.loads(run_python(["-P", "-c", AVAILABLE], cwd=elsewhere).stdout)
    assert json.loads(run_python(at_root, cwd=ROOT).stdout) == without
    assert json.loads(run_python(at_root, cwd=ROOT, path=[other_kernels]).stdout)[0] is True
