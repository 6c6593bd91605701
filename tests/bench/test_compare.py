"""Regressions, noise, and what is not compared."""

import pytest

from dsd_fast.bench.compare import compare
from tests.bench.samples import quality, refused, speed

OLD = speed(median=4.0, low=3.8, high=4.2)

CASES = {
    # The whole new interval lies below the old one, and the median fell by 25 %.
    "regression": (speed(median=3.0, low=2.9, high=3.1), "worse"),
    # As far below, but the intervals overlap: noise.
    "noise": (speed(median=3.0, low=2.5, high=3.81), "same"),
    # Intervals apart, but a fall of 8 %: less than what two processes may differ by.
    "small": (speed(median=3.68, low=3.65, high=3.7), "same"),
    "just over the threshold": (speed(median=3.59, low=3.55, high=3.6), "worse"),
    "improvement": (speed(median=5.0, low=4.9, high=5.1), "better"),
    "small improvement": (speed(median=4.3, low=4.25, high=4.35), "same"),
    "equal": (OLD, "same"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_ratio_is_worse_only_beyond_the_noise(name):
    new, state = CASES[name]
    (found,) = compare([OLD], [new])
    assert (found.name, found.state) == ("product/8", state)
    ratio = new["ratio"]
    text = f"4.00x (3.80 to 4.20) before, {ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f}) now"
    assert found.text == text


def test_a_slower_machine_is_no_regression():
    slow = speed(median=4.0, low=3.8, high=4.2)
    for side in ("subject", "baseline"):
        for key in ("median", "p20", "p80"):
            slow[side][key] *= 10
    assert compare([OLD], [slow])[0].state == "same"


def test_the_latest_passing_record_counts():
    new = speed(median=3.0, low=2.9, high=3.1)
    assert compare([OLD, new, refused()], [new])[0].state == "same"
    assert compare([new, OLD, refused()], [new])[0].state == "worse"


def test_changed_versions_are_told():
    new = speed(median=3.0, low=2.9, high=3.1, versions=OLD["versions"] | {"diffusers": "0.43.0"})
    (found,) = compare([OLD], [new])
    assert found.text.endswith(" now; diffusers 0.42.1 to 0.43.0")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ([], OLD, "the old records have it not at all"),
        ([speed("other")], OLD, "the old records have it not at all"),
        (
            [speed(machine=OLD["machine"] | {"threads": 1})],
            OLD,
            "the old records have it only under other conditions (Processor, 1 threads)",
        ),
        (
            [speed(machine=OLD["machine"] | {"kind": "cuda", "name": "GPU"})],
            OLD,
            "the old records have it only under other conditions (GPU, 2 threads)",
        ),
        ([OLD], refused(), "it gave no result to compare"),
        ([quality("product/8")], OLD, "the old record is one of quality"),
        (
            [speed(subject=OLD["subject"] | {"sizes": {"rows": 4}})],
            OLD,
            "the subject's sizes was {'rows': 4} and is {'rows': 8}",
        ),
        (
            [speed(baseline=OLD["baseline"] | {"batch": 2})],
            OLD,
            "the baseline's batch was 2 and is 1",
        ),
        (
            [OLD],
            speed(ratio=OLD["ratio"] | {"coverage": 0.9375}),
            "the new record has too few repeats: its interval covers 94%",
        ),
        (
            [speed(ratio=OLD["ratio"] | {"coverage": 0.0})],
            OLD,
            "the old record has too few repeats: its interval covers 0%",
        ),
        ([quality(unit="MB")], quality(), "its unit was 'MB' and is 'share'"),
        (
            [quality(unit="MB")],
            quality(unit="MB", value=0.6, low=0.5, high=0.69),
            "0.800 (0.700 to 0.900) before, 0.600 (0.500 to 0.690) now; whether more is better is not known",
        ),
        ([quality(sizes={"size": 2})], quality(), "its sizes was {'size': 2} and is {'size': 1}"),
    ],
)
def test_what_cannot_be_compared_says_why(old, new, text):
    (found,) = compare(old, [new])
    assert (found.state, found.text) == ("not compared", text)


@pytest.mark.parametrize(
    ("value", "low", "high", "state"),
    [(0.6, 0.5, 0.69, "worse"), (0.6, 0.5, 0.71, "same"), (0.95, 0.91, 0.97, "better"), (0.85, 0.75, 0.93, "same")],
)
def test_a_share_is_worse_when_its_interval_lies_below(value, low, high, state):
    (found,) = compare([quality()], [quality(value=value, low=low, high=high)])
    assert found.state == state
    assert found.text == f"0.800 (0.700 to 0.900) before, {value:.3f} ({low:.3f} to {high:.3f}) now"
