"""The documents that are made from records: CSV beside them, figures, and the tables between markers in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsd_fast.bench import plots, tables
from dsd_fast.bench.case import Group, Suite
from dsd_fast.bench.records import Record, load
from dsd_fast.jobs import replacing

RESULTS = Path("benchmarks/results")
FIGURES = Path("docs/figures")

_BLOCK = re.compile(r"(<!-- bench:(\S+) -->\n)(.*?)(<!-- /bench:(\S+) -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- (/?)bench:(\S+) -->")


def update(root: Path, suites: Mapping[str, Callable[[], Suite]], check: bool) -> list[Path]:
    """Makes the documents of all suites.

    Args:
        root: the repository's.
        suites: name → what gives the suite.
        check: write nothing.

    Returns:
        The files that were not what the records say, relative to ``root``: now written or, where nothing is left to
        say, removed; with ``check`` as they were. Of a figure the plotted numbers count, not the bytes.

    Raises:
        ValueError: a line that is no record; a marker that names nothing, or is not closed; by file.
        OSError: a file cannot be read or written.
        ImportError: a figure must be drawn and matplotlib is missing.
    """
    made = {name: make() for name, make in suites.items()}
    records = {name: _records(root / RESULTS / f"{name}.jsonl") for name in made}
    # All contents before the first is written: a wrong marker leaves everything as it was.
    contents: dict[Path, bytes | None] = {}
    for name in made:
        contents[RESULTS / f"{name}.csv"] = tables.csv_text(records[name]).encode() if records[name] else None
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        if path.exists():
            file = path.relative_to(root)
            contents[file] = _filled(file, path.read_text(), made, records).encode()
    for suite in made.values():
        for group in suite.groups:
            file = _figure_file(suite, group)
            contents[file] = _figure(root / file, plots.plot_data(suite, group, records[suite.name]), check)
    stale = [file for file, content in contents.items() if _known(root / file) != content]
    for file in stale if not check else ():
        _write(root / file, contents[file])
    return stale


def _records(path: Path) -> list[Record]:
    return load(path) if path.exists() else []


def _figure(path: Path, data: dict[str, Any] | None, check: bool) -> bytes | None:
    """What a figure's file should hold: what it holds already, if that shows the same numbers."""
    known = _known(path)
    if data is None or (known is not None and plots.data_of(known) == data):
        return None if data is None else known
    # To check, it is enough that this is not what the file holds.
    return b"" if check else plots.svg(data)


def _figure_file(suite: Suite, group: Group) -> Path:
    return FIGURES / f"{suite.name}-{group.name}.svg"


def _filled(file: Path, text: str, suites: Mapping[str, Suite], records: Mapping[str, list[Record]]) -> str:
    """A document with the blocks between its markers made anew."""

    def block(match: re.Match[str]) -> str:
        opening, name, _, closing, closed = match.groups()
        if name != closed:
            raise ValueError(f"{file}: the marker bench:{name} is closed by /bench:{closed}")
        suite, group = _named(file, name, suites)
        lines = [tables.markdown(suite, group, records[suite.name])]
        if plots.plot_data(suite, group, records[suite.name]) is not None:
            link = _figure_file(suite, group).relative_to(file.parent) if file.parent != Path() else None
            lines.append(f"![{group.title}]({(link or _figure_file(suite, group)).as_posix()})")
        return opening + "\n\n".join(["", *lines, ""]).lstrip("\n") + closing

    whole = _BLOCK.findall(text)
    if len(_MARKER.findall(text)) != 2 * len(whole):
        raise ValueError(f"{file}: its bench markers do not come in pairs of <!-- bench:X --> and <!-- /bench:X -->")
    return _BLOCK.sub(block, text)


def _named(file: Path, name: str, suites: Mapping[str, Suite]) -> tuple[Suite, Group]:
    names = {f"{suite.name}/{group.name}": (suite, group) for suite in suites.values() for group in suite.groups}
    if name not in names:
        raise ValueError(f"{file}: the marker bench:{name} names nothing; there are {', '.join(sorted(names))}")
    return names[name]


def _known(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _write(path: Path, content: bytes | None) -> None:
    """Gives a file its content; None removes it."""
    if content is None:
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)
