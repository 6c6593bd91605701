"""`make gpu`: all that needs a CUDA device, in one go: the checks, the suites, one table last.

It needs torch, pytest and this package's source tree: nothing is installed, and what lacks a package is left out and
named. The checks and each suite run in a process of their own, so that a fault on the device ends one of them and the
table still comes. Records are appended to $OUT, or to benchmarks/results, as each case ends. The short run ends within
8 minutes.

    python -m benchmarks.gpu                  # checks, and the short cases of the suites
    python -m benchmarks.gpu --full           # the suites' long grid; what has its record already is left out
    python -m benchmarks.gpu --sanitize       # the tests marked `sanitizer` under compute-sanitizer
    python -m benchmarks.gpu -- -k score      # further arguments for pytest
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import torch

from dsd_fast.bench.case import Context
from dsd_fast.bench.records import Record, load
from dsd_fast.bench.run import Runner
from dsd_fast.bench.session import finished, run, select
from dsd_fast.bench.suites import SUITES
from dsd_fast.bench.tables import summary

ROOT = Path(__file__).parents[1]
NAMES = ("ops", "unet", "features", "fit")
DEVICE = "cuda"
_SUITES = f"{', '.join(NAMES[:-1])} and {NAMES[-1]}"

# Seconds of a short run, after which no case starts, and what a case may take beyond them.
SHORT = 390
GRACE = 80

# What the suites import beyond torch and Triton.
NEEDS = {"unet": "diffusers", "features": "diffusers", "fit": "diffusers"}

SANITIZER = Path("/usr/local/cuda/bin/compute-sanitizer")


@dataclass
class Checks:
    """What pytest counted.

    Attributes:
        passed, failed, skipped: tests; an error counts as failed.
        trouble: why there is no count, or what is wrong besides.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    trouble: str = ""

    def __str__(self) -> str:
        counts = f"checks: {self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{counts}; {self.trouble}" if self.trouble else counts

    @property
    def good(self) -> bool:
        """Whether nothing failed."""
        return not self.failed and not self.trouble


@dataclass
class Report:
    """What the run ends with.

    Attributes:
        checks: of pytest; None where none were run.
        records: of the cases.
        notes: a line each: what was left out, or went wrong.
        faults: suites whose process ended by itself.
    """

    checks: Checks | None = None
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The table, after what must be known to read it."""
        lines = [*self.notes, *(f"{name}: its process ended before its cases did" for name in self.faults)]
        lines += [str(self.checks)] if self.checks else []
        return "\n".join([*lines, summary(self.records) if self.records else "no case gave a record"])

    @property
    def code(self) -> int:
        """0 when every check passed and every case that ran gave a right result."""
        good = self.checks is None or self.checks.good
        return 0 if good and not self.faults and all(record["ok"] for record in self.records) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; the exit code."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"No CUDA device is here; {_would(options)} would have run.", file=sys.stderr)
        return 2
    if options.suite:
        return measure(options.suite, options.full, options.until)
    if options.sanitize:
        return sanitize(options.pytest)
    begin, report, results = time.monotonic(), Report(), folder()
    if not options.full:
        report.checks = check(options.pytest, begin + SHORT)
    for place, name in enumerate(NAMES):
        if importlib.util.find_spec(NEEDS.get(name, "torch")) is None:
            report.notes.append(f"{name}: left out, {NEEDS[name]} is not installed")
            continue
        left = begin + SHORT - time.monotonic()
        if not options.full and left <= 0:
            report.notes.append(f"{name}: left out, no time is left")
            continue
        until = None if options.full else time.monotonic() + left / (len(NAMES) - place)
        _suite(name, options.full, until, results / f"{name}.jsonl", report)
    print(f"\n{report.text()}\n{time.monotonic() - begin:.0f} s; records in {results}", flush=True)
    return report.code


def folder() -> Path:
    """Where records go."""
    return Path(os.environ.get("OUT") or ROOT / "benchmarks/results")


def check(arguments: Sequence[str], until: float) -> Checks:
    """Runs the tests marked `gpu`, up to a time by :func:`time.monotonic`."""
    file = folder() / "gpu-checks.xml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={file}", *arguments]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=max(0.0, until - time.monotonic())).returncode
    except subprocess.TimeoutExpired:
        return Checks(trouble="they did not end in time")
    if not file.exists():
        return Checks(trouble=f"pytest ended with {code}")
    checks = count(file.read_text())
    file.unlink()
    # 5: nothing was collected.
    if code not in (0, 1, 5) or (code == 1 and not checks.failed):
        checks.trouble = f"pytest ended with {code}"
    return checks


def count(report: str) -> Checks:
    """The counts of a report in JUnit's XML."""
    checks = Checks()
    for suite in ElementTree.fromstring(report).iter("testsuite"):
        total, failures, errors, skipped = (
            int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
        )
        checks.failed += failures + errors
        checks.skipped += skipped
        checks.passed += total - failures - errors - skipped
    return checks


def measure(name: str, full: bool, until: float | None) -> int:
    """Runs the cases of one suite in this process."""
    # What a case calls float32 has IEEE products; cuDNN would take tf32.
    torch.backends.cudnn.allow_tf32 = False
    suite, path = SUITES[name](), folder() / f"{name}.jsonl"
    done = finished(load(path), DEVICE) if full and path.exists() else ()
    selection = select(suite, DEVICE, short=not full, done=done)
    for reason, number in Counter(selection.left_out.values()).items():
        print(f"{name}: {number} case{'' if number == 1 else 's'} left out, {reason}", flush=True)
    runner = Runner(suite, Context(DEVICE))
    run(runner, selection.cases, path, lambda text, wrong: print(text, flush=True), deadline=until)
    return 0


def sanitize(arguments: Sequence[str]) -> int:
    """Runs the tests marked `sanitizer` under compute-sanitizer: memcheck, then racecheck."""
    tool = shutil.which("compute-sanitizer") or (str(SANITIZER) if SANITIZER.exists() else None)
    if tool is None:
        print("compute-sanitizer is not installed: nothing was checked.", file=sys.stderr)
        return 2
    # Freed memory must be gone for the tool to see that it is read.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    codes = []
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "1", "--target-processes", "all", sys.executable]
        command += ["-m", "pytest", "-m", "gpu and sanitizer", "tests/gpu", *arguments]
        print(f"compute-sanitizer, {kind}", flush=True)
        codes.append(subprocess.run(command, cwd=ROOT, env=environment).returncode)
    return 1 if any(codes) else 0


def _suite(name: str, full: bool, until: float | None, path: Path, report: Report) -> None:
    """Runs a suite in a process of its own and adds what came of it to the report."""
    before = len(load(path)) if path.exists() else 0
    command = [sys.executable, "-m", "benchmarks.gpu", "--suite", name]
    command += ["--full"] if full else []
    limit = None
    if until is not None:
        command += ["--until", str(until)]
        limit = until - time.monotonic() + GRACE
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        code = 1
    if code:
        report.faults.append(name)
    records = load(path) if path.exists() else []
    if full:
        shown = finished(records, DEVICE)
        report.records += [record for place, record in enumerate(records) if place >= before or record["case"] in shown]
    else:
        report.records += records[before:]


def _would(options: argparse.Namespace) -> str:
    if options.sanitize:
        return "the tests marked sanitizer under compute-sanitizer"
    if options.full:
        return f"all cases of the suites {_SUITES}"
    return f"the tests marked gpu and the short cases of the suites {_SUITES}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="the long grid instead of checks and short cases; resumes")
    parser.add_argument("--sanitize", action="store_true", help="the tests marked sanitizer under compute-sanitizer")
    # Of the processes that this one starts: clocks of one machine's processes agree.
    parser.add_argument("--suite", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("pytest", nargs="*", help="after --: further arguments for pytest")
    return parser


if __name__ == "__main__":
    sys.exit(main())
