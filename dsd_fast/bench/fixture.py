"""The suites' cases under pytest-benchmark: the same work, checked the same way before it is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

import torch

from dsd_fast.bench.case import Case, Context, Suite, UnavailableError, Work
from dsd_fast.bench.run import checked


@dataclass(frozen=True)
class TimedSide:
    """The first side of a case, its baseline, or the last, its subject; as text a test's id."""

    case: Case
    is_baseline: bool

    def __str__(self) -> str:
        return f"{self.case.name}-{'baseline' if self.is_baseline else 'subject'}"


def sides(suite: Suite) -> list[TimedSide]:
    """Both sides of each of a suite's cases of speed."""
    cases = [case for case in suite.cases if isinstance(case, Case)]
    return [TimedSide(case, is_baseline) for case in cases for is_baseline in (True, False)]


def run_side(benchmark: Any, timed: TimedSide, context: Context) -> None:
    """Times one side of a case.

    Args:
        benchmark: pytest-benchmark's fixture.
        timed: the side.
        context: what the cases of a session share, the set-up of each included.

    Raises:
        RefusedError: the result of one of the case's sides is wrong.
        SkipTest: the case cannot be run here, with the reason.
    """
    case = timed.case
    if torch.device(context.device).type not in case.devices:
        raise SkipTest(f"it is for {' or '.join(case.devices)}")

    def prepare() -> Work:
        work = case.prepare(context)
        checked(work)
        return work

    try:
        work = context.shared(f"work of {case.name}", prepare)
    except UnavailableError as reason:
        raise SkipTest(str(reason)) from reason
    side = work.sides[0 if timed.is_baseline else -1]
    benchmark.group = case.name
    benchmark.extra_info.update(side=side.name, batch=side.batch, items=work.items, item=work.item, **side.sizes)
    benchmark.pedantic(side.run, rounds=case.repeats, warmup_rounds=1)
