"""The table of what every tuned Triton kernel uses on every architecture, made by compiling, without a GPU.

``python -m dsd_fast.bench.resources --write`` makes the installed Triton's part of
``benchmarks/results/resources.csv`` and the tables of ``docs/kernels.md`` anew; without ``--write`` it says what
differs. The pinned Triton has all rows, the oldest those of bfloat16 on Hopper.
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
from typing import Any

from dsd_fast import kernels
from dsd_fast.kernels.common.build import Build
from dsd_fast.kernels.common.resources import measure

CAPABILITIES = (80, 90, 100)
"""The columns of the tables."""

PROCESSES = 2

HOPPER = 90

TABLE = Path("benchmarks/results/resources.csv")
DOCUMENT = Path("docs/kernels.md")

CONSTRAINTS = (Path("constraints.txt"), Path("constraints-oldest.txt"))
"""Where the versions of Triton stand that the table is of: the pinned one, and the oldest."""

_TEXTS = ("operator", "build", "triton", "source")
_PIN = re.compile(r"^triton==(\S+)", re.MULTILINE)
_BLOCK = re.compile(r"(<!-- resources:(\w+) -->\n)(.*?)(<!-- /resources -->)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture: what Resources and HotLoop say, by which Triton, and of which source."""

    operator: str
    build: str
    triton: str
    capability: int
    warps: int
    registers: int
    stack: int
    shared: int
    programs: int
    slots: int
    barriers: int
    warpgroup: int
    warp: int
    wide: int
    narrow: int
    local: int
    source: str


def operators() -> list[str]:
    """The rooms that hold Triton kernels with tuned configurations, by name."""
    folder = Path(next(iter(kernels.__path__)))
    return sorted(file.parent.name for file in folder.glob("*/kernel.py") if file.parent.name != "common")


def builds(operator: str) -> list[Build]:
    """The tuned configurations of an operator."""
    found: list[Build] = importlib.import_module(f"dsd_fast.kernels.{operator}.kernel").builds()
    return found


def versions(root: Path = Path()) -> list[str]:
    """The versions of Triton that the table is of: the pinned one, and the oldest."""
    return [_PIN.findall((root / file).read_text())[0] for file in CONSTRAINTS]


def source_digest(operator: str, triton: str) -> str:
    """Tells the kernels of an operator, and Triton's version, from others: 12 digits; comments do not count."""
    folder = Path(next(iter(kernels.__path__)))
    files = [*sorted((folder / operator).glob("*kernel.py")), folder / "common" / "kernel.py"]
    parsed = [ast.dump(ast.parse(file.read_text())) for file in files]
    return hashlib.sha256("\n".join([triton, *parsed]).encode()).hexdigest()[:12]


def listed(build: Build, capability: int, pinned: bool) -> bool:
    """Whether the table has a row of the pinned Triton, or of the oldest."""
    return pinned or (capability == HOPPER and "*bf16" in build.signature.values())


def measured(operator: str, build: Build, capability: int) -> Row:
    """The row that the installed Triton gives."""
    used = asdict(measure(build, capability))
    loop, triton = used.pop("loop"), version("triton")
    return Row(
        operator, build.name, triton, capability, build.warps, **used, **loop, source=source_digest(operator, triton)
    )


def table_rows() -> list[Row]:
    """Compiles the table's configurations with the installed Triton; some minutes, seconds with Triton's cache."""
    pinned = version("triton") == versions()[0]
    jobs = [
        (operator, number, capability)
        for operator in operators()
        for number, build in enumerate(builds(operator))
        for capability in CAPABILITIES
        if listed(build, capability, pinned)
    ]
    # A fork of a process whose torch has threads can hang.
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_row, jobs, chunksize=8))


def _row(job: tuple[str, int, int]) -> Row:
    operator, number, capability = job
    return measured(operator, builds(operator)[number], capability)


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
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    numbers = [{name: int(value) for name, value in line.items() if name not in _TEXTS} for line in lines]
    return [Row(**(line | known)) for line, known in zip(lines, numbers, strict=True)]


def filled(text: str, rows: Iterable[Row]) -> str:
    """A document with the tables between its markers ``<!-- resources:OPERATOR -->`` made anew."""
    known = list(rows)
    return _BLOCK.sub(lambda match: match[1] + "\n".join(_table(match[2], known)) + "\n" + match[4], text)


def _table(operator: str, rows: list[Row]) -> Iterator[str]:
    """What an operator's builds use, a column for each architecture and Triton, and what their hot loops issue."""
    pinned, *others = dict.fromkeys(row.triton for row in rows)
    columns = [*((pinned, capability) for capability in CAPABILITIES), *((other, HOPPER) for other in others)]
    titles = [f"sm_{capability}" + ("" if triton == pinned else f", Triton {triton}") for triton, capability in columns]
    yield "| build | warps | " + " | ".join(titles) + " | slots | matrix products | accesses |"
    yield "|---|---|" + "---|" * (len(columns) + 3)
    used = {(row.build, row.triton, row.capability): row for row in rows if row.operator == operator}
    for build in dict.fromkeys(row.build for row in rows if row.operator == operator):
        cells = [used.get((build, *column)) for column in columns]
        shown = [
            "–" if row is None else f"{row.registers}, {row.shared / 1024:.1f} KiB, {row.programs}" for row in cells
        ]
        hopper = used[build, pinned, HOPPER]
        products = f"{hopper.warpgroup} + {hopper.warp}" if hopper.warp else f"{hopper.warpgroup}"
        shown += [f"{hopper.slots}", products, f"{hopper.wide} + {hopper.narrow}"]
        yield f"| {build} | {hopper.warps} | " + " | ".join(shown) + " |"


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a file is not what the kernels give."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table and the document")
    write = parser.parse_args(arguments).write
    kept = read_table(TABLE) if TABLE.exists() else []
    rows = sorted(
        [*table_rows(), *(row for row in kept if row.triton != version("triton") and row.triton in versions())],
        key=lambda row: versions().index(row.triton),
    )
    contents = {TABLE: csv_text(rows), DOCUMENT: filled(DOCUMENT.read_text(), rows)}
    stale = [path for path, content in contents.items() if not path.exists() or path.read_text() != content]
    for path in stale:
        print(f"{path}: {'written' if write else 'is not what the kernels give'}")
        if write:
            path.write_text(contents[path])
    return int(bool(stale) and not write)


if __name__ == "__main__":
    sys.exit(main())
