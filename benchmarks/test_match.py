"""The suite `match` under pytest-benchmark: `pytest benchmarks/test_match.py -k headline`."""

import pytest

from dsd_fast.bench.fixture import run_side, sides
from dsd_fast.bench.suites.match import suite


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("side", sides(suite), ids=str)
def test_match(benchmark, context, side):
    run_side(benchmark, side, context)
