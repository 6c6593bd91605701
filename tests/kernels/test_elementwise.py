"""The memory-bound operators' tests once more, in processes that interpret their kernels."""

from pathlib import Path

import pytest

from tests.kernels.elementwise import INTERPRETED, run_interpreted

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="it starts such a process")
@pytest.mark.parametrize(
    "operators",
    [
        pytest.param(["geglu"], marks=pytest.mark.newest),
        # A process takes longer to start than to interpret most of them.
        ["add_layer_norm", "group_norm_silu", "noise_latents", "pack_features", "forced"],
    ],
    ids="-".join,
)
def test_kernels_under_the_interpreter(operators):
    run_interpreted(*(Path(__file__).with_name(f"test_{name}.py") for name in operators))
