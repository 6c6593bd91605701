"""The suite `ops` under pytest-benchmark: `pytest benchmarks/test_ops.py -k backward/width-40`."""

import pytest

from dsd_fast.bench.fixture import run_side, sides
from dsd_fast.bench.suites.ops import suite


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("side", sides(suite), ids=str)
def test_ops(benchmark, context, side):
    run_side(benchmark, side, context)
