"""Timers, the interleaving of sides, and what is said about the samples."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Timer = Callable[[Callable[[], Any]], float]

CONFIDENCE = 0.95

# Of a GPU's clock, which ticks about twice a nanosecond: from half a millisecond to a quarter of a second.
_FIRST_CYCLES, _MOST_CYCLES = 1 << 20, 1 << 29


@dataclass(frozen=True)
class Stats:
    """Median, 20th and 80th percentile, and number of samples."""

    median: float
    p20: float
    p80: float
    repeats: int


@dataclass(frozen=True)
class Ratio:
    """How many times the baseline's time a side needs less, from runs side by side.

    Attributes:
        median: of the ratios baseline / subject of neighbouring runs.
        low, high: distribution-free interval of that median.
        coverage: of the interval; below :data:`CONFIDENCE` where there were fewer than 6 runs.
    """

    median: float
    low: float
    high: float
    coverage: float


def interleave(runs: Sequence[Callable[[], Any]], repeats: int, timer: Timer) -> list[list[float]]:
    """Seconds of each of ``runs``, ``repeats`` times in turn (A B A B …), so that a drift of the machine meets all.

    Raises:
        ValueError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, seconds in zip(runs, samples, strict=True):
            seconds.append(timer(run))
    return samples


def cpu_timer(clock: Callable[[], float] = time.perf_counter) -> Timer:
    """Times a call by ``clock``, with the garbage collector off."""

    def timer(run: Callable[[], Any]) -> float:
        with _no_collection():
            start = clock()
            run()
            return clock() - start

    return timer


def cuda_timer(device: str, launches: bool = True) -> Timer:
    """Times a call by CUDA events, with a cold L2 cache and the garbage collector off.

    Args:
        device: "cuda" or "cuda:N".
        launches: whether the time has in it what the host needs to launch the call's kernels. Where it has not, the
            device is kept busy until the host has launched them all.
    """
    import torch

    place = torch.device(device)
    # Twice the cache, so that whatever its replacement policy nothing of the last call is left. It is read: lines that
    # were written would have to go back to memory during the call.
    scratch = torch.zeros(2 * torch.cuda.get_device_properties(place).L2_cache_size // 4, device=place)
    event: Any = torch.cuda.Event
    cycles = _FIRST_CYCLES

    def measured(run: Callable[[], Any], cycles: int) -> tuple[float, bool]:
        """Seconds, and whether the device was still busy when the host had launched all."""
        start, end = event(enable_timing=True), event(enable_timing=True)
        scratch.sum()
        torch.cuda.synchronize()
        if cycles:
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        behind = not start.query()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3, behind

    def timer(run: Callable[[], Any]) -> float:
        nonlocal cycles
        with torch.cuda.device(place), _no_collection():
            if launches:
                return measured(run, 0)[0]
            while True:
                seconds, behind = measured(run, cycles)
                # A call that waits for the device itself is never ahead of it; its launches count.
                if behind or cycles >= _MOST_CYCLES:
                    return seconds
                cycles *= 2

    return timer


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collects garbage now, so that none has to be collected inside."""
    # What the last run left is young, since nothing was collected meanwhile. A full collection would walk all objects
    # of the imported libraries, which takes longer than many a run.
    gc.collect(1)
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile of ``share``, linear between the two nearest values."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def stats(seconds: Sequence[float]) -> Stats:
    """Of one side's samples."""
    return Stats(quantile(seconds, 0.5), quantile(seconds, 0.2), quantile(seconds, 0.8), len(seconds))


def ratio(baseline: Sequence[float], subject: Sequence[float]) -> Ratio:
    """Of two sides' samples, run in turn."""
    pairs = [one / other for one, other in zip(baseline, subject, strict=True)]
    return Ratio(quantile(pairs, 0.5), *median_interval(pairs))


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Interval of the median of the distribution that ``values`` are drawn from: low, high, coverage.

    The k-th smallest and k-th largest of n values enclose the median with probability 1 − 2 P(Binomial(n, ½) < k),
    whatever the distribution. k is the largest that keeps :data:`CONFIDENCE`, or 1 where none does.
    """
    ordered, n = sorted(values), len(values)
    tail, k = 2.0 ** (1 - n), 1
    while True:
        wider = tail + math.comb(n, k) * 2.0 ** (1 - n)
        if 2 * k >= n or 1 - wider < CONFIDENCE:
            break
        tail, k = wider, k + 1
    return ordered[k - 1], ordered[n - k], max(0.0, 1 - tail)
