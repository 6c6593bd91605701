"""Which cases a run takes, and the run: what each case gives is appended when it ends, so that a run can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from dsd_fast.bench import machine
from dsd_fast.bench.case import Case, Quality, Suite, UnavailableError
from dsd_fast.bench.records import Record, append, machine_key
from dsd_fast.bench.run import Runner

Say = Callable[[str, bool], None]


@dataclass(frozen=True)
class Selection:
    """The cases of a run.

    Attributes:
        cases: those to run, in the suite's order.
        left_out: name of each case that fits the pattern and is not run → why.
    """

    cases: list[Case | Quality] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def select(
    suite: Suite, device: str, *, only: str | None = None, short: bool = False, done: Collection[str] = ()
) -> Selection:
    """The cases that are meant for a device.

    Args:
        suite: theirs.
        device: "cpu", "cuda" or "cuda:N".
        only: pattern of the names to take; None takes all.
        short: leaves long cases out.
        done: names of cases that have their records already.
    """
    kind, selection = torch.device(device).type, Selection()
    for case in suite.cases:
        if only is not None and not fnmatchcase(case.name, only):
            continue
        if isinstance(case, Case) and kind not in case.devices:
            selection.left_out[case.name] = f"it is for {' or '.join(case.devices)}"
        elif case.long and short:
            selection.left_out[case.name] = "it is long"
        elif case.name in done:
            selection.left_out[case.name] = "it has a record of this commit on this device"
        else:
            selection.cases.append(case)
    return selection


def finished(records: Iterable[Record], device: str) -> set[str]:
    """Names of the cases that gave a result at this commit, with changes or without as now, on this device."""
    here = {"machine": machine.describe(device), "environment": machine.environment()}
    commit, key = machine.commit(), machine_key(here)
    return {
        record["case"]
        for record in records
        if record["ok"] and machine_key(record) == key and (record["commit"], record["dirty"]) == commit
    }


def run(
    runner: Runner, cases: Sequence[Case | Quality], path: Path, say: Say, *, deadline: float | None = None
) -> list[Record]:
    """Runs cases one after the other and appends what each gives to a file.

    Args:
        runner: of their suite.
        cases: some of it.
        path: of the records.
        say: takes a line about what goes on, and whether it is about something wrong.
        deadline: by :func:`time.monotonic`; no case starts after it.

    Returns:
        The records. A case that cannot be run here, or would start too late, gives none, and that is said.

    Raises:
        RecordError, OSError: a record cannot be written.
    """
    made: list[Record] = []
    for number, case in enumerate(cases, start=1):
        if deadline is not None and time.monotonic() > deadline:
            say(f"{case.name}: left out, there is no time left", True)
            continue
        say(f"{runner.suite.name}, {number} of {len(cases)}: {case.name}", False)
        try:
            found = list(runner.run(case))
        except UnavailableError as reason:
            say(f"{case.name}: left out, {reason}", True)
            continue
        append(path, *(record for record, _ in found))
        for record, text in found:
            made.append(record)
            if text:
                say(f"{record['name']}: {text}", True)
    return made
