"""What a benchmark is made of: suites, cases, the sides they compare, and figures of quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Plot = Literal["latency", "waterfall", "quality", "growth"]
Measure = Literal["ratio", "rate", "copy_share", "matmul_share"]

DEVICES = ("cpu", "cuda")


class UnavailableError(Exception):
    """A case cannot be run here, with the reason: a package, a library or a device that it needs is missing."""


class Context:
    """What the cases of one run share.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._made: dict[str, Any] = {}

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once under that name."""
        if name not in self._made:
            self._made[name] = make()
        value: T = self._made[name]
        return value


@dataclass(frozen=True)
class Target:
    """What a side is meant to reach. A record says whether it did; missing it is no error.

    Attributes:
        measure: "ratio", times faster than the baseline; "rate", items a second; "copy_share" and "matmul_share", of
            the machine's copy bandwidth and of its matmul peak.
        least: the least value that reaches it.
    """

    measure: Measure
    least: float


@dataclass(frozen=True)
class Side:
    """One way of doing a case's job.

    Attributes:
        name: what it is, in a few words.
        run: does the whole job once and returns its result; each call does all of it anew.
        batch: rows in its largest network call.
        sizes: whatever else sets the cost, by name.
        bytes: that one run moves, where that is known.
        flops: of one run, where torch's counter cannot see them (compiled and replayed code); None has them counted.
        dtype: of the bulk of its arithmetic, where that is not the work's.
        against: names of the sides that it is measured against, a record for each, with what it is meant to reach
            there. Empty: it is a baseline alone. None: against the side before it, so that sides form a ladder.
    """

    name: str
    run: Callable[[], Any]
    batch: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    bytes: int | None = None
    flops: int | None = None
    dtype: str | None = None
    against: Mapping[str, Sequence[Target]] | None = None


@dataclass(frozen=True)
class Work:
    """The job of a case, set up.

    Attributes:
        sides: two or more, the baseline first; each is measured against the one before it unless it names others.
        difference: (result, oracle's result) → how far apart they are.
        tolerance: the largest difference at which a side is timed.
        accuracy: what ``difference`` measures, e.g. "largest difference of a score".
        oracle: gives the right result; None: the first side's result is right.
        oracle_name: what the oracle is.
        item, items: what a run makes, in the singular, and how many, e.g. "pair", 256.
        dtype: of the bulk of the arithmetic, a torch type's name.
        launches: whether a run's time on a GPU has in it what the host needs to launch it. Where it has not, the time
            is the device's alone, as in a replayed graph. On a CPU it means nothing.
    """

    sides: Sequence[Side]
    difference: Callable[[Any, Any], float]
    tolerance: float
    accuracy: str
    oracle_name: str
    item: str
    items: int
    oracle: Callable[[], Any] | None = None
    dtype: str = "float32"
    launches: bool = True

    def __post_init__(self) -> None:
        if len(self.sides) < 2:
            raise ValueError(f"sides: got {len(self.sides)}, expected a baseline and at least one more")
        names = [side.name for side in self.sides]
        if len(set(names)) < len(names):
            raise ValueError(f"sides: got {names}, expected names that differ")
        for side in self.sides:
            unknown = sorted(set(side.against or ()) - set(names) | set(side.against or ()) & {side.name})
            if unknown:
                raise ValueError(f"side {side.name!r} is against {unknown}, expected others of {names}")
            for targets in (side.against or {}).values():
                if side.bytes is None and any(target.measure == "copy_share" for target in targets):
                    raise ValueError(f"side {side.name!r}: a target of its copy share needs its bytes")
        if not self.comparisons():
            raise ValueError("sides: none is measured against another")

    def comparisons(self) -> list[tuple[int, int, Sequence[Target]]]:
        """Each pair of sides that a record compares, by their places: subject, baseline, and the targets."""
        places = {side.name: place for place, side in enumerate(self.sides)}
        found: list[tuple[int, int, Sequence[Target]]] = []
        for place, side in enumerate(self.sides):
            if side.against is not None:
                found += [(place, places[name], targets) for name, targets in side.against.items()]
            elif place:
                found.append((place, place - 1, ()))
        return found


@dataclass(frozen=True)
class Case:
    """A measurement of speed.

    Attributes:
        name: unique within the suite.
        group: the :class:`Group` it is shown in.
        prepare: sets the job up; nothing heavy happens before it is called.
        repeats: timed runs of each side. From 6 on the interval of the ratio covers 95 %.
        devices: kinds of device that it is meant for.
        long: whether a short run leaves it out.
    """

    name: str
    group: str
    prepare: Callable[[Context], Work]
    repeats: int = 7
    devices: Sequence[str] = DEVICES
    long: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure of merit with its interval.

    Attributes:
        name: unique within the suite. In plots and wide tables, figures whose names differ after the last comma alone
            share a line; with "growth" and in wide tables, what stands before a colon is not shown.
        value, low, high: the figure and its 95 % interval; for a share right, Wilson's, by :meth:`share`.
        n: observations behind it.
        unit: "share", or what else the value is; of shares alone it is known that more is better.
        chance: what guessing gives.
        floor: the least value that passes; below it the result counts as wrong.
        sizes: settings that it was measured with, by name.
        seconds: that one item took, where the cost was measured too.
        item: what one item is, e.g. "pair".
        group: the :class:`Group` it is shown in; None: its case's.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str = "share"
    chance: float | None = None
    floor: float | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    item: str = "item"
    group: str | None = None

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(
                f"figure {self.name!r}: got {self.value}, which is outside of its interval {self.low} to {self.high}"
            )

    @classmethod
    def share(cls, name: str, right: int, n: int, **rest: Any) -> Figure:
        """``right`` of ``n``, with the 95 % Wilson interval.

        Raises:
            ValueError: ``n`` is 0, or ``right`` is not between 0 and ``n``.
        """
        if n < 1:
            raise ValueError(f"figure {name!r}: got n = {n}, expected at least 1")
        # Here, for the command line imports this module when it starts, and figures of merit need numpy.
        from dsd_fast.metrics import wilson

        low, high = wilson(right, n)
        # Rounding may put the bound of a perfect share beside it.
        return cls(name, right / n, min(low, right / n), max(high, right / n), n, **rest)

    @property
    def passes(self) -> bool:
        """Whether the value is a number and not below its floor."""
        return math.isfinite(self.value) and (self.floor is None or self.value >= self.floor)


@dataclass(frozen=True)
class Quality:
    """A measurement of figures of merit.

    Attributes:
        name: unique within the suite.
        group: the :class:`Group` its figures are shown in, unless they name another.
        measure: makes the figures.
        long: whether a short run leaves it out.
    """

    name: str
    group: str
    measure: Callable[[Context], Sequence[Figure]]
    long: bool = False


@dataclass(frozen=True)
class Group:
    """Cases that share a table, and perhaps a plot.

    Attributes:
        name: of the table's marker in the documents, ``bench:SUITE/NAME``, and of the plot's file.
        title: of both.
        plot: "latency" (time per item against ``x``), "waterfall" (the rungs of a ladder), "quality" (figures against
            the seconds they cost) or "growth" (figures against ``x``, those at 0 as levels); None: no plot.
        x: for "latency" and "growth" the size on the horizontal axis, for "quality" the size that labels a point.
        wide: whether the table has a line of figures a row, and a column for each value of ``x``.
        columns: what parts the line of a figure's name from its column; then there is a column for each of those,
            whatever ``wide``. Empty: names are not parted.
    """

    name: str
    title: str
    plot: Plot | None = None
    x: str = "rows"
    wide: bool = False
    columns: str = ""


@dataclass(frozen=True)
class Suite:
    """Cases that are run together and keep their records in one file.

    Raises:
        ValueError: two cases of one name, or a case in a group that the suite lacks.
    """

    name: str
    groups: Sequence[Group]
    cases: Sequence[Case | Quality]

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"suite {self.name!r}: cases of one name: {', '.join(twice)}")
        groups = {group.name for group in self.groups}
        for case in self.cases:
            if case.group not in groups:
                raise ValueError(f"suite {self.name!r}: case {case.name!r} is in no group of it, {case.group!r}")

    def place(self, case: str) -> int:
        """Position of the case of that name; −1 if there is none."""
        return next((place for place, each in enumerate(self.cases) if each.name == case), -1)
