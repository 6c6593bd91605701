"""Records as tables: for the terminal, for Markdown documents, and as CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dsd_fast.bench.case import Case, Group, Suite
from dsd_fast.bench.records import Record, flat, latest, machine_key
from dsd_fast.bench.timing import CONFIDENCE

if TYPE_CHECKING:
    from rich.table import Table

# Of a command, the option that picks the case.
_ONLY = re.compile(r" --only (?:'[^']*'|\S+)")

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
_GPU = ("case", "time", "against", "times faster", "of matmul peak", "of copy peak", "target")
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


def extra_columns(records: Sequence[Record]) -> dict[str, Callable[[Record], str]]:
    """Columns that stand at the end of a table of speeds only where a record has something to say in them."""
    columns: dict[str, Callable[[Record], str]] = {}
    if any(record["subject"]["copy_share"] is not None for record in records):
        columns["of copy bandwidth"] = lambda record: _share(record["subject"]["copy_share"])
    if any("targets" in record for record in records):
        columns["target"] = targets
    return columns


def targets(record: Record) -> str:
    """What the subject is meant to reach, and whether it does; "-" if nothing was said."""
    return (
        "; ".join(
            f"{_REACHED[name](each['least'])}: {'met' if each['met'] else 'not met'}"
            for name, each in record.get("targets", {}).items()
        )
        or "-"
    )


def plain(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as plain text, the first column to the left and the others too, each as wide as it must be."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in lines)


def summary(records: Sequence[Record]) -> str:
    """A run's records as plain text, a line each; those that gave no result say why."""
    rows = []
    for record in records:
        if record["kind"] != "speed":
            # In the last column, so that a sentence makes none of the others wide.
            rows.append([record["name"], *["-"] * (len(_GPU) - 2), f"no result: {record['reason']}"])
            continue
        ours = record["subject"]
        cells = [f"{record['suite']}: {speed_row(record)[0]}", duration(ours["median"]), record["baseline"]["name"]]
        cells += [f"{record['ratio']['median']:.2f}", f"{ours['matmul_share']:.0%}", _share(ours["copy_share"])]
        rows.append([*cells, targets(record)])
    return plain(_GPU, rows)


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
            extra = extra_columns(chosen) if kind == "speed" else {}
            table = Table(*columns, *extra)
            for column in table.columns[1:]:
                column.justify = "right"
            for record in chosen:
                table.add_row(*(Text(cell) for cell in (*row(record), *(cell(record) for cell in extra.values()))))
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
        if group.wide or group.columns:
            parts.append(_wide(group, rows))
            continue
        kind = rows[0]["kind"]
        columns, row = (_SPEED, speed_row) if kind == "speed" else (_QUALITY, quality_row)
        alike = [record for record in rows if record["kind"] == kind]
        extra = extra_columns(alike) if kind == "speed" else {}
        names = (*columns, *extra, "command")
        lines = [_cells(names), _cells(["---"] * len(names))]
        for record in alike:
            lines.append(_cells([*row(record), *(cell(record) for cell in extra.values()), f"`{record['command']}`"]))
        parts.append("\n".join([f"{group.title}. {provenance(rows)}", "", *lines]))
    if not parts:
        return f"{group.title}: not measured yet; `dsd-fast bench {suite.name}{_device(suite, group)}` does it."
    return "\n\n".join(parts)


def line_of(record: Record) -> str:
    """The line that a figure of a wide table belongs to: its name up to the last comma, and from a colon on."""
    name: str = record["name"].rpartition(", ")[0] or record["name"]
    return name.partition(": ")[2] or name


def _wide(group: Group, rows: Sequence[Record]) -> str:
    """A table of figures with a row for each line and a column for each value of the group's size, or each column."""
    figures = [record for record in rows if record["kind"] == "quality"]
    lines: dict[str, dict[Any, Record]] = {}
    for record in figures:
        line, column = line_of(record), record["sizes"].get(group.x)
        if group.columns:
            line, _, column = record["name"].rpartition(group.columns)
        lines.setdefault(line, {})[column] = record
    every = dict.fromkeys(column for found in lines.values() for column in found)
    columns = list(every) if group.columns else sorted(every)
    heads = columns if group.columns else [f"{size:,} {group.x}" for size in columns]
    names = ("what", *heads, "n", "chance")
    table = [_cells(names), _cells(["---"] * len(names))]
    for line, found in lines.items():
        cells = [_figure(found[column]) if column in found else "-" for column in columns]
        counts = sorted({record["n"] for record in found.values()})
        count = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        table.append(_cells([line, *cells, count, quality_row(next(iter(found.values())))[3]]))
    commands = dict.fromkeys(_ONLY.sub("", record["command"]) for record in figures)
    made = ", ".join(f"`{command}`" for command in commands)
    return "\n".join([f"{group.title}. {provenance(rows)} Made by {made}.", "", *table])


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
    rows = [{name: _cell(value) for name, value in flat(record).items()} for record in records]
    out = io.StringIO()
    writer = csv.DictWriter(out, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _device(suite: Suite, group: Group) -> str:
    """The option that a group needs none of whose cases is for a CPU."""
    cases = [case for case in suite.cases if case.group == group.name]
    elsewhere = bool(cases) and all(isinstance(case, Case) and "cpu" not in case.devices for case in cases)
    return " --device cuda" if elsewhere else ""


_REACHED: dict[str, Callable[[float], str]] = {
    "ratio": lambda least: f"{least:.2f} times faster",
    "rate": lambda least: f"{least:,.0f} a second",
    "copy_share": lambda least: f"{least:.0%} of copy bandwidth",
    "matmul_share": lambda least: f"{least:.0%} of matmul peak",
}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


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
        # What three digits round up to the unit counts as one.
        if seconds >= 0.9995 * size:
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
    """JSON where plain text would not tell what it was."""
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return str(value).lower() if isinstance(value, bool) else value
