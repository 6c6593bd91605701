"""The suite `unet` under pytest-benchmark: `pytest benchmarks/test_unet.py -k mini`."""

import pytest

from dsd_fast.bench.fixture import run_side, sides
from dsd_fast.bench.suites.unet import suite


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("side", sides(suite), ids=str)
def test_unet(benchmark, context, side):
    run_side(benchmark, side, context)
