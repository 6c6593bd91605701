"""The suite `features` under pytest-benchmark: `pytest benchmarks/test_features.py -k extract`."""

import pytest

from dsd_fast.bench.fixture import run_side, sides
from dsd_fast.bench.suites.features import suite


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("side", sides(suite), ids=str)
def test_features(benchmark, context, side):
    run_side(benchmark, side, context)
