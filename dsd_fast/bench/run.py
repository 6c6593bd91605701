"""Runs cases: checks each side against the oracle, then times them in turn, and makes the records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import torch

from dsd_fast.bench import machine, measure
from dsd_fast.bench.case import Case, Context, Figure, Quality, Side, Suite, Target, UnavailableError, Work
from dsd_fast.bench.records import SCHEMA, Record
from dsd_fast.bench.timing import Timer, interleave, ratio, stats

Peaks = Callable[[str], dict[str, Any]]


class Runner:
    """Runs the cases of one suite on one device.

    Args:
        suite: whose cases they are.
        context: what they share.
        repeats: timed runs of each side; None leaves it to each case.
        timer: of all cases; the device's own if None, which counts launches where a case does.
        peaks: type name → the machine's peaks, as :func:`dsd_fast.bench.measure.peaks`, which is taken if None.
    """

    def __init__(
        self,
        suite: Suite,
        context: Context,
        *,
        repeats: int | None = None,
        timer: Timer | None = None,
        peaks: Peaks | None = None,
    ) -> None:
        self.suite, self.context, self.repeats = suite, context, repeats
        self._options = ["--device", context.device, "--threads", str(torch.get_num_threads())]
        self._options += [] if repeats is None else ["--repeats", str(repeats)]
        self._timer_of = cache(lambda launches: timer or measure.timer_for(context.device, launches))
        self._peaks_of = cache(peaks or partial(measure.peaks, context.device))
        self._commit = machine.commit()

    def run(self, case: Case | Quality) -> Iterator[tuple[Record, str]]:
        """The records of one case, each with what there is to say beyond it ("" if nothing).

        A case whose result is wrong, or that ends with an error, gives one record that says so.

        Raises:
            UnavailableError: the case cannot be run here, which is no result.
        """
        try:
            made = self._figures(case) if isinstance(case, Quality) else self._speeds(case)
        except RefusedError as refusal:
            yield self._record(case, case.name, "refused", reason=str(refusal)), str(refusal)
        except UnavailableError:
            raise
        except Exception as error:
            # Only the kind of error is recorded: its message may hold paths.
            text = f"{type(error).__name__}: {error}"
            yield self._record(case, case.name, "refused", reason=type(error).__name__), text
        else:
            for record in made:
                yield record, record["reason"] or ""

    def _figures(self, case: Quality) -> list[Record]:
        figures = case.measure(self.context)
        if not figures:
            raise RefusedError("no figure was made")
        return [self._figure(case, figure) for figure in figures]

    def _figure(self, case: Quality, figure: Figure) -> Record:
        if not math.isfinite(figure.value):
            raise RefusedError(f"{figure.name} is {figure.value}")
        reason = None if figure.passes else f"{figure.name} is {figure.value:.4g}, below its floor of {figure.floor:g}"
        fields = asdict(figure)
        # A figure may be made of numpy's numbers, which JSON does not know.
        for key in ("value", "low", "high", "chance", "floor", "seconds"):
            fields[key] = None if fields[key] is None else float(fields[key])
        fields["n"] = int(fields["n"])
        fields["sizes"] = {key: int(size) for key, size in fields["sizes"].items()}
        fields["group"] = figure.group or case.group
        if fields["group"] not in {group.name for group in self.suite.groups}:
            raise ValueError(f"figure {figure.name!r} is in no group of suite {self.suite.name!r}, {figure.group!r}")
        return self._record(case, fields.pop("name"), "quality", reason=reason, **fields)

    def _speeds(self, case: Case) -> list[Record]:
        work = case.prepare(self.context)
        flops, differences = checked(work)
        peaks = [self._peaks_of(side.dtype or work.dtype) for side in work.sides]
        # The second call of each side; the first has paid for what later ones do not.
        memory = [measure.peak_memory(self.context.device, side.run) for side in work.sides]
        runs = [side.run for side in work.sides]
        samples = interleave(runs, self.repeats or case.repeats, self._timer_of(work.launches))
        sides = [self._side(*each) for each in zip(work.sides, samples, flops, memory, peaks, strict=True)]
        comparisons, records = work.comparisons(), []
        for place, against, targets in comparisons:
            found = ratio(samples[against], samples[place])
            record = self._record(
                case,
                _record_name(case, work, place, against),
                "speed",
                reason=None,
                unit="s",
                item=work.item,
                items=work.items,
                accuracy={
                    "measure": work.accuracy,
                    "value": differences[place],
                    "tolerance": float(work.tolerance),
                    "oracle": work.oracle_name,
                },
                subject=sides[place],
                baseline=sides[against],
                ratio=asdict(found),
                peaks=peaks[place],
            )
            if targets:
                record["targets"] = _reached(targets, record)
            records.append(record)
        return records

    def _side(
        self, side: Side, seconds: list[float], flops: int, memory: int | None, peaks: dict[str, Any]
    ) -> dict[str, Any]:
        found = stats(seconds)
        moved = None if side.bytes is None else side.bytes / found.median / peaks["copy_bytes"]
        return {
            "name": side.name,
            "batch": side.batch,
            "sizes": dict(side.sizes),
            **asdict(found),
            "flops": flops,
            "bytes": side.bytes,
            "memory": memory,
            "matmul_share": flops / found.median / peaks["matmul_flops"],
            "copy_share": moved,
        }

    def _record(self, case: Case | Quality, name: str, kind: str, *, reason: str | None, **fields: Any) -> Record:
        head, dirty = self._commit
        options = " ".join(["--only", _quoted(case.name), *self._options])
        return {
            "schema": SCHEMA,
            "kind": kind,
            "suite": self.suite.name,
            "case": case.name,
            "name": name,
            "group": case.group,
            "ok": reason is None,
            "reason": reason,
            "command": f"dsd-fast bench {self.suite.name} {options}",
            **fields,
            "date": machine.now(),
            "machine": machine.describe(self.context.device),
            "versions": machine.versions(),
            "environment": machine.environment(),
            "commit": head,
            "dirty": dirty,
        }


def _record_name(case: Case, work: Work, place: int, against: int) -> str:
    """The case's, with the subject where it is not the only one, and the baseline where it is not the only one."""
    comparisons = work.comparisons()
    name = case.name
    if len({subject for subject, _, _ in comparisons}) > 1:
        name += f", {work.sides[place].name}"
    if sum(subject == place for subject, _, _ in comparisons) > 1:
        name += f", against {work.sides[against].name}"
    return name


def _reached(targets: Sequence[Target], record: Record) -> dict[str, Any]:
    """For each target its least value, the value, and whether that reaches it."""
    subject = record["subject"]
    values = {
        "ratio": record["ratio"]["median"],
        "rate": record["items"] / subject["median"],
        "copy_share": subject["copy_share"],
        "matmul_share": subject["matmul_share"],
    }
    found: dict[str, Any] = {}
    for target in targets:
        value = values[target.measure]
        found[target.measure] = {"least": float(target.least), "value": value, "met": value >= target.least}
    return found


class RefusedError(Exception):
    """A case whose result must not be reported, with the reason."""


def checked(work: Work) -> tuple[list[int], list[float]]:
    """FLOPs of each side, and how far its result is from the oracle's.

    Raises:
        RefusedError: a side's result is wrong.
    """
    right = None if work.oracle is None else work.oracle()
    flops, differences = [], []
    for place, side in enumerate(work.sides):
        result, count = (side.run(), side.flops) if side.flops is not None else measure.count_flops(side.run)
        if place == 0 and work.oracle is None:
            right = result
        difference = float(work.difference(result, right))
        # Not `>`: a difference that is no number is wrong too.
        if not difference <= work.tolerance:
            raise RefusedError(
                f"{side.name}: {work.accuracy} is {difference:.3g}, more than {work.tolerance:g}, against "
                f"{work.oracle_name}"
            )
        flops.append(count)
        differences.append(difference)
    return flops, differences


def _quoted(name: str) -> str:
    return name if all(c.isalnum() or c in "-_./" for c in name) else f"'{name}'"
