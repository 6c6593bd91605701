import math

import numpy as np
import pytest

from dsd_fast.metrics import bootstrap, wilson


def test_wilson_interval():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))
    assert wilson(10, 10)[1] == 1.0


@pytest.mark.parametrize(("right", "n"), [(-1, 10), (11, 10), (1, 0)])
def test_wilson_refuses_what_is_no_proportion(right, n):
    with pytest.raises(ValueError, match=f"right: got {right}, expected between 0 and n = {n}"):
        wilson(right, n)


def mean(sample):
    return sample.mean(0)


def binomial_bounds(right, n):
    """2.5 % and 97.5 % quantiles of Binomial(n, right / n) / n, which a resampled share follows."""
    p, total, bounds = right / n, 0.0, []
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if len(bounds) < 2 and total >= (0.025, 0.975)[len(bounds)]:
            bounds.append(k / n)
    return bounds


# For these the distribution function jumps past either level by more than 4 standard errors of 20,000 resamples
# (4 · √(0.025 · 0.975 / 20000) = 0.0044), so that the quantiles found are the distribution's own.
@pytest.mark.parametrize(("right", "n"), [(7, 20), (33, 40)])
def test_the_interval_of_a_share_is_the_binomial_distributions(right, n):
    values = np.arange(n) < right
    low, high = bootstrap(values, mean, resamples=20_000, seed=1)
    assert [float(low), float(high)] == pytest.approx(binomial_bounds(right, n))
    # Each observation three times over says no more than one of it; alone they would say more.
    copies, keys = np.repeat(values, 3), [f"image {i // 3}" for i in range(3 * n)]
    clustered = bootstrap(copies, mean, clusters=keys, resamples=20_000, seed=1)
    assert [float(bound) for bound in clustered] == pytest.approx(binomial_bounds(right, n))
    low_apart, high_apart = bootstrap(copies, mean, seed=1)
    assert high_apart - low_apart < 0.8 * (high - low)


def test_the_interval_of_a_median_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).normal(size=101)
    low, high = bootstrap(values, np.median, resamples=5_000, seed=5)
    want = stats.bootstrap((values,), np.median, method="percentile", n_resamples=5_000, rng=4).confidence_interval
    # A bound is an order statistic: two runs differ by a few of 101 normal values' gaps (0.02 each near the middle).
    assert (float(low), float(high)) == (pytest.approx(want.low, abs=0.06), pytest.approx(want.high, abs=0.06))


def test_clusters_of_different_sizes_are_drawn_whole():
    values = np.array([1.0, 10, 10, 100, 100, 100])
    seen = []

    def statistic(sample):
        seen.append(sorted(sample.tolist()))
        return [len(sample), sample.sum()]

    low, high = bootstrap(values[[3, 0, 1, 4, 2, 5]], statistic, clusters=list("cabcbc"), resamples=200)
    whole = {1: [1.0], 2: [10.0, 10.0], 3: [100.0] * 3}
    assert {len(sample) for sample in seen} == set(range(3, 10))
    for sample in seen:
        counts = {size: sample.count(value[0]) / size for size, value in whole.items()}
        assert sum(counts.values()) == 3
        assert all(count.is_integer() for count in counts.values())
    assert low.shape == high.shape == (2,)
    assert low.tolist() <= high.tolist()


def test_a_seed_fixes_the_interval_and_confidence_widens_it():
    values = np.random.default_rng(0).normal(size=(50, 2))
    first, again, other = (bootstrap(values, mean, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    wide = bootstrap(values, mean, confidence=0.99)
    assert (wide[0] < first[0]).all()
    assert (wide[1] > first[1]).all()
    assert [float(bound) for bound in bootstrap([1, 1, 1], mean)] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, r"values: got shape \(0,\), expected at least one observation"),
        ({"values": 1.0}, "values: got shape"),
        ({"clusters": [0]}, "clusters: got 1, expected one for each of 2 values"),
        ({"confidence": 95}, "confidence: got 95"),
        ({"resamples": 0}, "resamples: got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(**({"values": [0, 1], "statistic": mean} | arguments))
