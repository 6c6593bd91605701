"""The table of what every tuned Triton kernel uses on every architecture, made by compiling, without a GPU.

``python -m dsd_fast.bench.resources --write`` makes ``benchmarks/results/resources.csv`` and the tables of
``docs/kernels.md`` anew; without ``--write`` it says what differs.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import importlib
import io
import multiprocessing
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from dsd_fast import kernels
from dsd_fast.kernels.common.build import Build
from dsd_fast.kernels.common.resources import measure

CAPABILITIES = (80, 90, 100)
"""The columns of the tables."""

PROCESSES = 2

TABLE = Path("benchmarks/results/resources.csv")
DOCUMENT = Path("docs/kernels.md")

_NUMBERS = ("capability", "warps", "registers", "stack", "shared")
_BLOCK = re.compile(r"(<!-- resources:(\w+) -->\n)(.*?)(<!-- /resources -->)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture; sizes in bytes, registers and stack of a thread; what it was compiled from."""

    operator: str
    build: str
    capability: int
    warps: int
    registers: int
    stack: int
    shared: int
    source: str


def operators() -> list[str]:
    """The rooms that hold Triton kernels with tuned configurations, by name."""
    folder = Path(next(iter(kernels.__path__)))
    return sorted(file.parent.name for file in folder.glob("*/kernel.py") if file.parent.name != "common")


def builds(operator: str) -> list[Build]:
    """The tuned configurations of an operator."""
    found: list[Build] = importlib.import_module(f"dsd_fast.kernels.{operator}.kernel").builds()
    return found


def source_digest(operator: str) -> str:
    """Tells the kernels of an operator, and Triton's version, from others: 12 digits; comments do not count."""
    folder = Path(next(iter(kernels.__path__)))
    files = [*sorted((folder / operator).glob("*kernel.py")), folder / "common" / "kernel.py"]
    parsed = [ast.dump(ast.parse(file.read_text())) for file in files]
    return hashlib.sha256("\n".join([version("triton"), *parsed]).encode()).hexdigest()[:12]


def table_rows() -> list[Row]:
    """Compiles every tuned configuration for every architecture; some minutes, seconds with Triton's cache."""
    jobs = [
        (operator, number, capability)
        for operator in operators()
        for number in range(len(builds(operator)))
        for capability in CAPABILITIES
    ]
    # A fork of a process whose torch has threads can hang.
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_row, jobs, chunksize=8))


def _row(job: tuple[str, int, int]) -> Row:
    operator, number, capability = job
    build = builds(operator)[number]
    used = measure(build, capability)
    return Row(operator, build.name, capability, build.warps, **asdict(used), source=source_digest(operator))


def csv_text(rows: Iterable[Row]) -> str:
    """The rows as CSV with a header."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return file.getvalue()


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return [
            Row(line["operator"], line["build"], *(int(line[name]) for name in _NUMBERS), source=line["source"])
            for line in csv.DictReader(file)
        ]


def filled(text: str, rows: Iterable[Row]) -> str:
    """A document with the tables between its markers ``<!-- resources:OPERATOR -->`` made anew."""
    known = list(rows)
    return _BLOCK.sub(lambda match: match[1] + "\n".join(_table(match[2], known)) + "\n" + match[4], text)


def _table(operator: str, rows: list[Row]) -> Iterator[str]:
    """Registers and shared memory of an operator's builds, a column for each architecture."""
    yield "| build | warps | " + " | ".join(f"sm_{capability}" for capability in CAPABILITIES) + " |"
    yield "|---|---|" + "---|" * len(CAPABILITIES)
    used = {(row.build, row.capability): row for row in rows if row.operator == operator}
    for build in dict.fromkeys(row.build for row in rows if row.operator == operator):
        cells = [used[build, capability] for capability in CAPABILITIES]
        shown = " | ".join(f"{row.registers}, {row.shared / 1024:.1f} KiB" for row in cells)
        yield f"| {build} | {cells[0].warps} | {shown} |"


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a file is not what the kernels give."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table and the document")
    write = parser.parse_args(arguments).write
    rows = table_rows()
    contents = {TABLE: csv_text(rows), DOCUMENT: filled(DOCUMENT.read_text(), rows)}
    stale = [path for path, content in contents.items() if not path.exists() or path.read_text() != content]
    for path in stale:
        print(f"{path}: {'written' if write else 'is not what the kernels give'}")
        if write:
            path.write_text(contents[path])
    return int(bool(stale) and not write)


if __name__ == "__main__":
    sys.exit(main())
