"""Imports go down only, as the design's floors say."""

import pytest

import dsd_fast
from tests.repository.floors import violations
from tests.repository.source import ROOT, module_name, python_files

BAD = [
    ("dsd_fast.unet.plan", "from dsd_fast.matching import Matcher", "unet imports matching, which is not below it"),
    ("dsd_fast.unet.plan", "from dsd_fast import Matcher", "unet imports matching, which is not below it"),
    ("dsd_fast.unet.plan", "from ..cli import main", "unet imports cli, which is not below it"),
    ("dsd_fast.unet.plan", "def f():\n    import dsd_fast.bench", "unet imports bench, which is not below it"),
    ("dsd_fast.diffusion.noise", "from dsd_fast import models", "diffusion imports models, which is not below it"),
    ("dsd_fast.images.batch", "from dsd_fast import models", "images imports models, which is not below it"),
    ("dsd_fast.matching.matcher", "import dsd_fast.features", "matching imports features, which is not below it"),
    ("dsd_fast.matching.matcher", "import dsd_fast", "matching imports the whole package, which hides the arrow"),
    (
        "dsd_fast.generation.run",
        "import dsd_fast.image_prompt",
        "generation imports image_prompt, which is not below it",
    ),
    ("dsd_fast.bench.suites", "import dsd_fast.cli", "bench imports cli, which is not below it"),
    (
        "dsd_fast.kernels.common.backend",
        "from dsd_fast.unet import plan",
        "kernels imports unet, which is not below it",
    ),
    ("dsd_fast.reference.matching", "from dsd_fast.images import decode", "reference imports images"),
    ("dsd_fast.reference.matching", "from PIL import Image", "reference imports PIL"),
    ("dsd_fast.matching.matcher", "from dsd_fast.reference import matching", "matching imports reference"),
    ("dsd_fast.unet.plan", "import dsd_fast.attic", "attic has no floor"),
    ("dsd_fast.kernels.token_maps.op", "import triton", "op imports triton"),
    ("dsd_fast.kernels.token_maps.op", "if True:\n    import triton", "op imports triton"),
    ("dsd_fast.kernels.token_maps.reference", "def f():\n    import triton", "reference imports triton"),
    ("dsd_fast.unet.plan", "def f():\n    import triton", "plan imports triton"),
]

GOOD = [
    ("dsd_fast.unet.plan", "import torch\nfrom dsd_fast.kernels.cross_attention_score import op"),
    ("dsd_fast.unet.plan", "from .text import TextKV\nfrom dsd_fast.models import Bundle"),
    ("dsd_fast.matching.matcher", "from dsd_fast import __version__, load\nfrom dsd_fast.unet import UNetProgram"),
    ("dsd_fast.class_tokens.learner", "from dsd_fast.generation import sample"),
    ("dsd_fast.bench.match", "from dsd_fast.reference import matching"),
    ("dsd_fast.cli.main", "import dsd_fast as dsd\nfrom dsd_fast.bench import run"),
    ("dsd_fast.kernels.token_maps.kernel", "import triton.language as tl"),
    ("dsd_fast.kernels.cross_attention_score.forward_kernel", "import triton.language as tl"),
    ("dsd_fast.kernels.token_maps.op", "def launch():\n    import triton"),
    (
        "dsd_fast.reference.matching",
        "import math\nimport numpy as np\nimport torch\nfrom diffusers.utils import logging",
    ),
]


@pytest.mark.parametrize(("module", "source", "reason"), BAD)
def test_violations_finds(module, source, reason):
    line = source.count("\n") + 1
    assert violations(source, module, dsd_fast._HOMES) == [f"line {line}: {reason}"]


@pytest.mark.parametrize(("module", "source"), GOOD)
def test_violations_passes(module, source):
    assert violations(source, module, dsd_fast._HOMES) == []


def test_relative_imports_of_a_package_start_at_itself():
    assert violations("from . import cli", "dsd_fast.unet", dsd_fast._HOMES, is_package=True) == []
    assert violations("from .. import cli", "dsd_fast.unet", dsd_fast._HOMES, is_package=True) != []


def test_package_keeps_its_floors():
    files = python_files("dsd_fast", "kernels")
    assert len({module_name(file) for file in files}) == len(files)
    found = {
        str(file.relative_to(ROOT)): violations(
            file.read_text(), module_name(file), dsd_fast._HOMES, file.name == "__init__.py"
        )
        for file in files
    }
    assert {file: lines for file, lines in found.items() if lines} == {}
