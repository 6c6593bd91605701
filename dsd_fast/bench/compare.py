"""Is a new record worse than an old one, beyond the noise?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dsd_fast.bench.records import Record, latest, machine_key
from dsd_fast.bench.timing import CONFIDENCE

State = Literal["worse", "same", "better", "not compared"]

THRESHOLD = 0.1
"""A ratio that falls by less than this share is no regression."""

# What is compared is the ratio to the baseline, which ran in turn with its subject: a slower machine slows both. Each
# ratio has an interval that holds its median with 95 % probability. Two such intervals of equal width that do not
# overlap lie 2 · 1.96 / √2 = 2.8 standard errors of their difference apart, which chance does once in 359 comparisons
# of unchanged code in this direction. What differs between two processes but not within one (where tensors lie in
# memory, what else the machine does) is in neither interval; the threshold is for that.


@dataclass(frozen=True)
class Comparison:
    """A new record beside the old one.

    Attributes:
        name: the record's.
        state: "worse" is a regression.
        text: one line that gives the figures, or why there is no comparison.
    """

    name: str
    state: State
    text: str


def compare(old: Sequence[Record], new: Iterable[Record]) -> list[Comparison]:
    """Each record of ``new`` beside the latest passing one of ``old`` of the same name, device and threads."""
    known = latest(list(old))
    return [_compare(known.get((record["name"], *machine_key(record))), record, old) for record in new]


def _compare(before: Record | None, now: Record, old: Sequence[Record]) -> Comparison:
    name = now["name"]
    if not now["ok"]:
        return Comparison(name, "not compared", "it gave no result to compare")
    if before is None:
        others = {_conditions(record) for record in old if record["name"] == name and record["ok"]}
        where = f"only under other conditions ({'; '.join(sorted(others))})" if others else "not at all"
        return Comparison(name, "not compared", f"the old records have it {where}")
    if before["kind"] != now["kind"]:
        return Comparison(name, "not compared", f"the old record is one of {before['kind']}")
    if now["kind"] == "quality":
        return _quality(name, before, now)
    return _speed(name, before, now)


def _speed(name: str, before: Record, now: Record) -> Comparison:
    for side in ("subject", "baseline"):
        for key in ("name", "batch", "sizes"):
            if before[side][key] != now[side][key]:
                text = f"the {side}'s {key} was {before[side][key]!r} and is {now[side][key]!r}"
                return Comparison(name, "not compared", text)
    old, new = before["ratio"], now["ratio"]
    for which, value in (("old", old), ("new", new)):
        if value["coverage"] < CONFIDENCE:
            text = f"the {which} record has too few repeats: its interval covers {value['coverage']:.0%}"
            return Comparison(name, "not compared", text)
    text = f"{_ratio(old)} before, {_ratio(new)} now{_changes(before, now)}"
    if new["high"] < old["low"] and new["median"] < old["median"] * (1 - THRESHOLD):
        return Comparison(name, "worse", text)
    if new["low"] > old["high"] and new["median"] > old["median"] / (1 - THRESHOLD):
        return Comparison(name, "better", text)
    return Comparison(name, "same", text)


def _quality(name: str, before: Record, now: Record) -> Comparison:
    """A figure's interval is all its noise: the same code on the same inputs gives the same value."""
    text = f"{_value(before)} before, {_value(now)} now{_changes(before, now)}"
    for key in ("unit", "sizes"):
        if before[key] != now[key]:
            return Comparison(name, "not compared", f"its {key} was {before[key]!r} and is {now[key]!r}")
    apart = now["high"] < before["low"] or now["low"] > before["high"]
    if apart and now["unit"] != "share":
        return Comparison(name, "not compared", f"{text}; whether more is better is not known")
    if not apart:
        return Comparison(name, "same", text)
    return Comparison(name, "worse" if now["value"] < before["value"] else "better", text)


def _conditions(record: Record) -> str:
    _, name, threads, environment = machine_key(record)
    return ", ".join(filter(None, (name, f"{threads} threads", environment)))


def _ratio(ratio: Record) -> str:
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _value(record: Record) -> str:
    return f"{record['value']:.3f} ({record['low']:.3f} to {record['high']:.3f})"


def _changes(before: Record, now: Record) -> str:
    """Versions that differ: the baseline may have become faster, or slower, by itself."""
    old, new = before["versions"], now["versions"]
    changed = [f"{name} {old[name]} to {new[name]}" for name in new if old[name] != new[name]]
    return f"; {', '.join(changed)}" if changed else ""
