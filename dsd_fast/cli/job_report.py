"""What the reports of jobs share: what became of the rows, when what was done, and what lies in the folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dsd_fast.cli.report import lane, paragraph, section, table, visible
from dsd_fast.jobs import Counts, Timeline, index_shards
from dsd_fast.jobs.store import OK

_UNITS = ("B", "kB", "MB", "GB", "TB")
_NUMBER = re.compile(r"^\d{5,}")
# Errors in a summary; the index has all.
_ERRORS = 50


def summary(numbers: Mapping[str, Any] | None, inputs: int, out: Path, columns: Sequence[str]) -> dict[str, Any]:
    """Tells what became of a job's rows.

    Args:
        numbers: of the run, see :func:`dsd_fast.cli.cluster.run`; None where it was interrupted.
        inputs: of all workers, that count where it was.
        columns: of an error.

    Returns:
        "complete"; "counts" of this run, or of the folder where it was interrupted; "folder", the "ok" and "errors" of
        all; "errors", the first; "seconds".
    """
    import pyarrow.compute as pc

    folder, errors = {"ok": 0, "errors": 0}, list[dict[str, Any]]()
    for rows in index_shards(out, ["id", *columns, "status", "reason", "message"]):
        bad = rows.filter(pc.not_equal(rows["status"], OK))
        folder["ok"] += len(rows) - len(bad)
        folder["errors"] += len(bad)
        errors += bad.slice(0, _ERRORS - len(errors)).to_pylist()
    if numbers is None:
        left = max(0, inputs - sum(folder.values()))
        counts = {**asdict(Counts(inputs=inputs)), **folder, "not_reached": left}
    else:
        made = Counts(**{field.name: int(numbers[field.name]) for field in fields(Counts)})
        counts = {**asdict(made), "not_reached": made.not_reached}
    seconds = 0.0 if numbers is None else numbers["seconds"]
    return {"complete": numbers is not None, "counts": counts, "folder": folder, "errors": errors, "seconds": seconds}


def hidden_share(numbers: Mapping[str, Any] | None, what: str) -> float:
    """Tells what share of the "writing", say, went on beside computing; 0 where there was none."""
    return numbers[f"{what}_hidden"] / numbers[what] if numbers and numbers[what] else 0.0


def last_timeline(out: Path) -> Timeline:
    """Reads that of the last run that wrote anything."""
    line = Timeline()
    files = sorted(out.glob("timeline*.json"), key=lambda file: file.stat().st_mtime)
    for span in json.loads(files[-1].read_bytes())["spans"] if files else ():
        line.add(span["name"], span["start"], span["end"])
    return line


def timeline(line: Timeline, hidden: Mapping[str, str], computing: str) -> str:
    """Makes the section of what was done when.

    Args:
        line: with spans.
        hidden: name → word of what went on beside "compute", as "write": "writing".
        computing: what that was, as "features were computed".
    """
    total = max(end for _, _, end in line.spans)
    rows = []
    for name in sorted({name for name, _, _ in line.spans}):
        own = [(start, end) for other, start, end in line.spans if other == name]
        rows.append([visible(name), lane(own, total), f"{line.seconds(name):.2f}"])
    shares = " and ".join(f"{line.overlap(name, 'compute'):.0%} of the {word}" for name, word in hidden.items())
    return section(
        "When",
        paragraph(f"{shares} went on while {computing}."),
        table(f"What was done in the {total:.1f} s of the last run", ["what", "when", "seconds"], rows, numbers=1),
    )


def files_of(out: Path) -> list[tuple[str, int, int]]:
    """Lists (kind, files, bytes) of what lies in the folder, by the folder at the top and the ending.

    Numbered files are one kind, too, and a file of several names (hard links) takes room once, under the first kind.
    """
    found: dict[str, list[int]] = {}
    seen = set()
    for parent, folders, names in os.walk(out):
        folders[:] = [name for name in folders if not name.startswith(".")]
        top = Path(parent).relative_to(out).parts[:1]
        for name in names:
            # The report cannot know its own size, and locks and files half written are no results.
            if name.startswith(".") or (not top and name == "report.html"):
                continue
            kind = f"{top[0]}/*{Path(name).suffix}" if top else _NUMBER.sub("*", name)
            status = (Path(parent) / name).stat()
            count = found.setdefault(kind, [0, 0])
            count[0] += 1
            count[1] += 0 if (status.st_dev, status.st_ino) in seen else status.st_size
            seen.add((status.st_dev, status.st_ino))
    return [(kind, count, size) for kind, (count, size) in sorted(found.items())]


def sized(count: float) -> str:
    """Writes bytes with a unit: 1.5 MB."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:,.0f} {_UNITS[unit]}" if unit == 0 or count >= 100 else f"{count:.1f} {_UNITS[unit]}"


def files(found: Sequence[tuple[str, int, int]]) -> str:
    """Makes the section of what lies in the folder, as :func:`files_of` lists it."""
    rows = [[visible(kind), f"{count:,}", sized(size) if size else "counted above"] for kind, count, size in found]
    rows.append(["together", f"{sum(each[1] for each in found):,}", sized(sum(each[2] for each in found))])
    return section("Files", table("What lies in the folder", ["files", "count", "size"], rows, numbers=2))
