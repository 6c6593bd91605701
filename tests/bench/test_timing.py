"""Statistics by hand, and what happens around a timed call."""

import gc
from statistics import NormalDist

import pytest

from dsd_fast.bench.timing import cpu_timer, interleave, median_interval, quantile, ratio, stats


class Clock:
    """Tells the given times in turn."""

    def __init__(self, *times):
        self.times = list(times)

    def __call__(self):
        return self.times.pop(0)


def test_a_call_takes_what_the_clock_says():
    timer = cpu_timer(Clock(10.0, 10.25, 20.0, 23.0))
    assert [timer(lambda: None), timer(lambda: None)] == [0.25, 3.0]


@pytest.mark.parametrize("was_on", [True, False])
def test_no_garbage_is_collected_during_a_call(was_on):
    states = []
    (gc.enable if was_on else gc.disable)()
    try:
        cpu_timer()(lambda: states.append(gc.isenabled()))
        assert gc.isenabled() is was_on
        with pytest.raises(ZeroDivisionError):
            cpu_timer()(lambda: 1 / 0)
        assert gc.isenabled() is was_on
    finally:
        gc.enable()
    assert states == [False]


def test_garbage_made_before_is_collected_before_the_clock_starts():
    class Node:
        pass

    freed = []
    node = Node()
    node.self = node
    node.__class__.__del__ = lambda self: freed.append(True)
    del node
    seen = []
    cpu_timer(lambda: seen.append(list(freed)) or 0.0)(lambda: None)
    assert seen[0] == [True]


def test_sides_run_in_turn():
    order = []
    seconds = iter([1.0, 10.0, 2.0, 20.0, 3.0, 30.0])

    def timer(run):
        run()
        return next(seconds)

    samples = interleave([lambda: order.append("A"), lambda: order.append("B")], 3, timer)
    assert order == ["A", "B", "A", "B", "A", "B"]
    assert samples == [[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]
    with pytest.raises(ValueError, match="repeats: got 0, expected at least 1"):
        interleave([lambda: None], 0, timer)


def test_stats_by_hand():
    # Sorted: 1 2 4 8 16 32; the positions 2.5, 1 and 4 of 0 … 5.
    found = stats([8.0, 1.0, 32.0, 2.0, 16.0, 4.0])
    assert (found.median, found.p20, found.p80, found.repeats) == (6.0, 2.0, 16.0, 6)
    assert quantile([5.0], 0.2) == 5.0
    assert quantile([0.0, 1.0], 0.2) == pytest.approx(0.2)


def test_ratio_is_of_neighbouring_runs():
    # The machine slows to a tenth of its speed half-way, for both sides: the ratio does not see it.
    baseline, subject = [4.0, 4.4, 4.2, 40.0, 44.0, 42.0], [2.0, 2.0, 2.0, 20.0, 20.0, 20.0]
    found = ratio(baseline, subject)
    assert found.median == pytest.approx(2.1)
    assert (found.low, found.high) == (pytest.approx(2.0), pytest.approx(2.2))
    assert found.coverage == pytest.approx(1 - 2 / 64)


@pytest.mark.parametrize(
    ("n", "k", "coverage"),
    [
        (1, 1, 0.0),
        (5, 1, 1 - 2 / 32),
        (6, 1, 1 - 2 / 64),
        (8, 1, 1 - 2 / 256),
        (9, 2, 1 - 2 * (1 + 9) / 512),
        (15, 4, 1 - 2 * (1 + 15 + 105 + 455) / 2**15),
    ],
)
def test_median_interval_by_hand(n, k, coverage):
    low, high, found = median_interval(list(range(n, 0, -1)))
    assert (low, high) == (k, n + 1 - k)
    assert found == pytest.approx(coverage)


def test_median_interval_holds_the_median_as_often_as_it_says():
    # Quantiles of a skewed distribution, shuffled by a fixed rule: its median is 1.
    generator, inside, total = __import__("random").Random(0), 0, 4000
    for _ in range(total):
        values = [2 ** NormalDist().inv_cdf(generator.random()) for _ in range(9)]
        low, high, coverage = median_interval(values)
        inside += low <= 1 <= high
    # Four standard errors of a share of 4,000.
    assert inside / total == pytest.approx(coverage, abs=4 * (coverage * (1 - coverage) / total) ** 0.5)
