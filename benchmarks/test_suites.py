"""The suites of speed under pytest-benchmark: `pytest benchmarks -k 'unet/mini'`."""

from typing import Any

import pytest

from dsd_fast.bench import Context
from dsd_fast.bench.fixture import TimedSide, run_side, sides
from dsd_fast.bench.suites import SUITES

SIDES = {f"{name}/{side}": side for name in ("features", "match", "ops", "unet") for side in sides(SUITES[name]())}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
def test_suites(benchmark: Any, context: Context, side: TimedSide) -> None:
    run_side(benchmark, side, context)
