"""Records as tables: for the terminal, for Markdown documents, and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsd_fast.bench.case import Group, Suite
from dsd_fast.bench.records import Record, flat, latest, machine_key
from dsd_fast.bench.timing import CONFIDENCE

if TYPE_CHECKING:
    from rich.table import Table

_SPEED = (
    "what",
    "time",
    "per item",
    "against",
    "its time",
    "times faster (95 %)",
    "accuracy",
    "memory, its memory",
    "of matmul peak",
)
_SHORT = ("case", "time per item", "baseline's", "times faster (95 %)", "difference, limit")
_QUALITY = ("what", "value (95 %)", "n", "chance", "floor", "time per item")


def speed_row(record: Record) -> tuple[str, ...]:
    """A record of speed, in the order of the columns: names, times with their 20th and 80th percentile, accuracy."""
    ours, other, ratio, accuracy = (record[key] for key in ("subject", "baseline", "ratio", "accuracy"))
    return (
        record["name"] if record["name"].endswith(ours["name"]) else f"{record['name']}: {ours['name']}",
        f"{duration(ours['median'])} ({duration(ours['p20'])} to {duration(ours['p80'])})",
        f"{duration(ours['median'] / record['items'])} per {record['item']}",
        other["name"],
        f"{duration(other['median'])} ({duration(other['p20'])} to {duration(other['p80'])})",
        _times(ratio),
        f"{accuracy['measure']} {accuracy['value']:.1e}, limit {accuracy['tolerance']:.0e} ({accuracy['oracle']})",
        f"{megabytes(ours['memory'])}, {megabytes(other['memory'])}",
        f"{ours['matmul_share']:.0%}",
    )


def quality_row(record: Record) -> tuple[str, ...]:
    """A record of quality, in the order of the columns."""
    return (
        record["name"],
        _figure(record),
        f"{record['n']:,}",
        "-" if record["chance"] is None else f"{record['chance']:.2f}",
        "-" if record["floor"] is None else f"{record['floor']:.2f}{'' if record['ok'] else ', not reached'}",
        "-" if record["seconds"] is None else f"{duration(record['seconds'])} per {record['item']}",
    )


def rich_tables(records: Sequence[Record]) -> list[Table]:
    """What a run gave, in short, speeds and figures apart; refused cases are not in them."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    for kind, columns, row in (("speed", _SHORT, _short_row), ("quality", _QUALITY, quality_row)):
        chosen = [record for record in records if record["kind"] == kind]
        if chosen:
            table = Table(*columns)
            for column in table.columns[1:]:
                column.justify = "right"
            for record in chosen:
                table.add_row(*(Text(cell) for cell in row(record)))
            tables.append(table)
    return tables


def chosen(suite: Suite, group: Group, records: Sequence[Record]) -> dict[tuple[str, ...], list[Record]]:
    """The latest records of a group by machine, in the order of the suite's cases.

    Figures of merit of former weights of the embedded model are left out: one table is about one model.
    """
    found: dict[tuple[str, ...], list[Record]] = {}
    weights = next((record["versions"]["mini"] for record in reversed(records) if record["kind"] == "quality"), None)
    for record in latest(list(records)).values():
        former = record["kind"] == "quality" and record["versions"]["mini"] != weights
        if record["group"] == group.name and suite.place(record["case"]) >= 0 and not former:
            found.setdefault(machine_key(record), []).append(record)
    for rows in found.values():
        # Stable: the rungs of a ladder stay in the order in which they were recorded.
        rows.sort(key=lambda record: suite.place(record["case"]))
    return dict(sorted(found.items()))


def markdown(suite: Suite, group: Group, records: Sequence[Record]) -> str:
    """The tables of a group, one for each machine, each with what it was measured on and the commands."""
    parts = []
    for rows in chosen(suite, group, records).values():
        kind = rows[0]["kind"]
        columns, row = (_SPEED, speed_row) if kind == "speed" else (_QUALITY, quality_row)
        lines = [_cells((*columns, "command")), _cells(["---"] * (len(columns) + 1))]
        lines += [_cells([*row(record), f"`{record['command']}`"]) for record in rows if record["kind"] == kind]
        parts.append("\n".join([f"{group.title}. {provenance(rows)}", "", *lines]))
    if not parts:
        return f"{group.title}: not measured yet; `dsd-fast bench {suite.name}` does it."
    return "\n\n".join(parts)


def provenance(rows: Sequence[Record]) -> str:
    """Machine, versions, commits and dates of some records of one machine, in a sentence or two."""
    machine = rows[0]["machine"]
    threads = f"{machine['threads']} CPU thread{'' if machine['threads'] == 1 else 's'}"
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    driver += f", {rows[0]['environment']}" if rows[0]["environment"] else ""
    made = sorted({tuple((name, version) for name, version in row["versions"].items() if version) for row in rows})
    versions = "; ".join(", ".join(f"{name} {version}" for name, version in each) for each in made)
    commits = sorted({_commit(row) for row in rows})
    days = sorted({row["date"][:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{machine['name']}, {threads}{driver}; {versions}; commit {', '.join(commits)}; {when}."


def csv_text(records: Sequence[Record]) -> str:
    """All records as CSV, a row each: nested fields in columns named by their path, sizes as JSON."""
    rows = [flat(record) for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in columns])
    return out.getvalue()


def _short_row(record: Record) -> tuple[str, ...]:
    ratio, accuracy = record["ratio"], record["accuracy"]
    ours, other = (duration(record[side]["median"] / record["items"]) for side in ("subject", "baseline"))
    return (
        record["name"],
        f"{ours} per {record['item']}",
        other,
        _times(ratio),
        f"{accuracy['value']:.1e}, {accuracy['tolerance']:.0e}",
    )


def _times(ratio: Record) -> str:
    """With its interval, unless there were too few runs for one."""
    interval = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio["coverage"] >= CONFIDENCE else ""
    return f"{ratio['median']:.2f}{interval}"


def _figure(record: Record) -> str:
    """Value and interval, with the unit unless it is a share; what was only counted has no interval."""
    interval = "" if record["low"] == record["high"] else f" ({record['low']:.3f} to {record['high']:.3f})"
    return f"{record['value']:.3f}{interval}{'' if record['unit'] == 'share' else ' ' + record['unit']}"


def duration(seconds: float) -> str:
    """Three digits with the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def megabytes(count: int | None) -> str:
    """Millions of bytes."""
    return "-" if count is None else f"{count / 1e6:,.0f} MB"


def _commit(record: Record) -> str:
    if record["commit"] is None:
        return "unknown"
    return f"{record['commit'][:9]}{' with changes' if record['dirty'] else ''}"


def _cells(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _cell(value: Any) -> str:
    """JSON where plain text would not tell what it was; None is empty."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return str(value).lower() if isinstance(value, bool) else str(value)
