"""The memory-bound operators' tests once more, in one process that interprets their kernels."""

from pathlib import Path

import pytest

from tests.kernels.elementwise import INTERPRETED, run_interpreted

OPERATORS = ("add_layer_norm", "geglu", "group_norm_silu", "noise_latents", "pack_features")

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.skipif(INTERPRETED, reason="it starts such a process")
def test_kernels_under_the_interpreter():
    run_interpreted(*(Path(__file__).with_name(f"test_{name}.py") for name in OPERATORS))
