"""`make gpu`: what needs a CUDA device, in steps of a planned length, a table after each of them.

It needs torch, pytest and this package's source tree: nothing is installed or built, and what lacks a package is left
out and named. Checks and cases run in processes of their own, so that a fault on the device ends one of them and the
next step still comes; how a test ended is on disk as it ends. Records are appended to $OUT, or to benchmarks/results,
as each case ends. The short run ends within 8 minutes.

    python -m benchmarks.gpu                  # the steps of the plan
    python -m benchmarks.gpu --plan           # the plan: steps, seconds, what is in them; needs no device
    python -m benchmarks.gpu --compile-ahead  # the smoke tests' kernels, packed to be shipped along; needs no device
    python -m benchmarks.gpu --cases 'tune/*' # the cases of all suites whose names fit, without a limit
    python -m benchmarks.gpu --full           # the suites' long grid; what has its record already is left out
    python -m benchmarks.gpu --sanitize       # the tests marked `sanitizer` under compute-sanitizer
    python -m benchmarks.gpu -- -k score      # further arguments for pytest
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from dsd_fast.bench import machine
from dsd_fast.bench.case import Context
from dsd_fast.bench.records import Record, load
from dsd_fast.bench.run import Runner
from dsd_fast.bench.session import finished, run, select
from dsd_fast.bench.suites import SUITES
from dsd_fast.bench.tables import summary

ROOT = Path(__file__).parents[1]
NAMES = ("ops", "unet", "features", "fit", "generate", "tokens", "prompts")
DEVICE = "cuda"
_SUITES = f"{', '.join(NAMES[:-1])} and {NAMES[-1]}"

# What the suites import beyond torch and Triton.
NEEDS = dict.fromkeys(NAMES[1:], "diffusers")

SANITIZER = Path("/usr/local/cuda/bin/compute-sanitizer")

# Kernels compiled elsewhere, by the same wheel of Triton for the same kind of GPU: found by their content, or not.
CACHE = ROOT / "benchmarks/triton-cache.tar.gz"

# Processes that share checks: most of a test's time is one core's, compiling.
PROCESSES = 12
# Planned for a kernel that has to be compiled: what the slowest take on one core.
COMPILATION = 6.0


@dataclass(frozen=True)
class Step:
    """A part of the short run.

    Attributes:
        name: in the table.
        seconds: planned; then it is cut, whatever it has given until then counts. What one step leaves the next has.
        tests: marks of the tests that it runs, None: none.
        cases: suite → patterns of the names of its cases.
    """

    name: str
    seconds: int
    tests: str | None = None
    cases: Mapping[str, Sequence[str]] = field(default_factory=dict)


_LONG = ("sd15/4096", "sd15/1024", "sd21/4096", "sd21/1024")
PLAN = (
    Step("machine", 15),
    Step("smoke", 60, "gpu and smoke"),
    Step(
        "forward, backward",
        45,
        cases={
            "ops": [
                *(f"forward/{each}" for each in (*_LONG, "sdxl/4096", "sdxl/1024")),
                *(f"{kind}/{each}" for kind in ("backward", "score-alone") for each in _LONG),
            ]
        },
    ),
    Step("tuning", 40, cases={"ops": ["tune/*"]}),
    Step("unet", 70, cases={"unet": ["sd15/16", "sd15/64"]}),
    Step(
        "elementwise, features",
        60,
        cases={"ops": ["elementwise/*", "features/*", "token-maps/sd15/4096"], "features": ["sd15/against-official"]},
    ),
    Step("generation", 45, cases={"generate": ["sd15/images"]}),
    Step("class tokens", 45, cases={"tokens": ["sd15/*"]}),
    Step("image prompts", 40, cases={"prompts": ["sd15/*"]}),
    Step("remaining checks", 60, "gpu and not smoke"),
)
MOST_SECONDS = 480


@dataclass
class Checks:
    """What pytest counted.

    Attributes:
        passed, failed, skipped: tests; an error counts as failed.
        first: the first failures, a line each.
        trouble: why there is no count, or what is wrong besides.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    first: list[str] = field(default_factory=list)
    trouble: str = ""

    def __str__(self) -> str:
        counts = f"checks: {self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return "\n".join([f"{counts}; {self.trouble}" if self.trouble else counts, *self.first])

    @property
    def good(self) -> bool:
        """Whether nothing failed."""
        return not self.failed and not self.trouble


@dataclass
class Report:
    """What a step, or a run, ends with.

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
        if self.records or not self.checks:
            lines.append(summary(self.records) if self.records else "no case gave a record")
        return "\n".join(lines)

    @property
    def code(self) -> int:
        """0 when every check passed and every case that ran gave a right result."""
        good = self.checks is None or self.checks.good
        return 0 if good and not self.faults and all(record["ok"] for record in self.records) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; the exit code."""
    options = _parser().parse_args(arguments)
    if options.plan:
        print(plan())
        return 0
    if options.compile_ahead:
        return compile_ahead(CACHE)
    if not torch.cuda.is_available():
        print(f"No CUDA device is here; {_would(options)} would have run.", file=sys.stderr)
        return 2
    if options.suite:
        return measure(options.suite, options.full, options.until, options.only)
    if options.sanitize:
        return sanitize(options.pytest)
    if options.full or options.cases:
        begin, report = time.monotonic(), Report()
        for name in NAMES:
            _suite(name, report, full=options.full, only=[options.cases] if options.cases else None)
        print(f"\n{report.text()}\n{time.monotonic() - begin:.0f} s; records in {folder()}", flush=True)
        return report.code
    return follow(PLAN, options.pytest)


def plan() -> str:
    """The steps of the short run, when each ends, and what is in it."""
    lines, end = [], 0
    for step in PLAN:
        end += step.seconds
        inside = [f"tests marked {step.tests}"] if step.tests else []
        inside += [f"{suite}: {', '.join(patterns)}" for suite, patterns in step.cases.items()]
        lines.append(f"{end - step.seconds:3}-{end:3} s  {step.name:<22}{'; '.join(inside) or 'versions, cache'}")
    return "\n".join(lines)


def follow(steps: Sequence[Step], arguments: Sequence[str] = ()) -> int:
    """Runs steps one after the other and tells after each what it gave; the exit code."""
    begin = end = time.monotonic()
    codes = []
    for step in steps:
        end += step.seconds
        report = Report()
        print(f"\n== {step.name}, planned until {end - begin:.0f} s", flush=True)
        if step.tests is None and not step.cases:
            report.notes += [str(machine.describe(DEVICE)), str(machine.environment()), unpack(CACHE)]
            print("\n".join(report.notes), flush=True)
            continue
        if step.tests is not None:
            report.checks = check(step.tests, arguments, end)
        for place, (name, patterns) in enumerate(step.cases.items()):
            now = time.monotonic()
            _suite(name, report, until=now + (end - now) / (len(step.cases) - place), only=patterns)
        print(f"{report.text()}\n{time.monotonic() - begin:.0f} s; records in {folder()}", flush=True)
        codes.append(report.code)
    return max(codes)


def folder() -> Path:
    """Where records go."""
    return Path(os.environ.get("OUT") or ROOT / "benchmarks/results")


def unpack(archive: Path) -> str:
    """Makes kernels compiled elsewhere those of this run and its processes; says what it did."""
    if not archive.exists():
        return "kernels are compiled here"
    target = folder() / "triton-cache"
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="data")
    os.environ["TRITON_CACHE_DIR"] = str(target)
    return f"{sum(1 for _ in target.rglob('*.cubin'))} kernels come from {archive.name}, if they fit"


def compile_ahead(archive: Path) -> int:
    """Compiles what the smoke tests launch, for an H200 that need not be there, and packs it for :func:`unpack`."""
    smoke, driver = importlib.import_module("tests.gpu.smoke"), importlib.import_module("tests.kernels.driver")
    with tempfile.TemporaryDirectory() as cache:
        with driver.absent_gpu(90, Path(cache)) as there:
            for problem in smoke.ATTENTION:
                problem.launch("cpu")
        pack(Path(cache), archive)
    print(f"{len(there.compilations)} kernels in {archive}")
    return 0


def pack(cache: Path, archive: Path) -> None:
    """Packs a folder of Triton's cache for :func:`unpack`."""
    with tarfile.open(archive, "w:gz") as packed:
        for file in sorted(cache.iterdir()):
            packed.add(file, file.name)


def run_within(command: Sequence[str], seconds: float | None) -> int | None:
    """Runs a command; its exit code, or None where its time was over.

    What it has started ends with it: pytest's workers would go on beside the step that is timed next.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def check(marks: str, arguments: Sequence[str], until: float) -> Checks:
    """Runs the tests with those marks, up to a time by :func:`time.monotonic`; what was counted until then counts."""
    file = folder() / "gpu-checks.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.outcomes", f"--outcomes={file}", "-q", "-m", marks]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(PROCESSES, os.cpu_count() or 1)), "--dist", "worksteal"]
    code, trouble = run_within([*command, *arguments], max(0.0, until - time.monotonic())), ""
    if code is None:
        trouble = "they did not end in time"
    elif code not in (0, 1, 5):
        # 5: nothing was collected.
        trouble = f"pytest ended with {code}"
    checks = count(file.read_text(encoding="utf-8") if file.exists() else "")
    file.unlink(missing_ok=True)
    checks.trouble = trouble or (f"pytest ended with {code}" if code == 1 and not checks.failed else "")
    return checks


def count(lines: str) -> Checks:
    """The counts of what :mod:`benchmarks.outcomes` wrote."""
    checks, seen = Checks(), dict[str, str]()
    for line in map(json.loads, lines.splitlines()):
        test, outcome = line["test"], line["outcome"]
        # A test that passed and whose end then failed has failed.
        if seen.get(test) == "failed":
            continue
        seen[test] = outcome
        if outcome == "failed" and len(checks.first) < 5:
            checks.first.append(f"failed: {test}: {line['why']}")
    totals = Counter(seen.values())
    checks.passed, checks.failed, checks.skipped = (totals[name] for name in ("passed", "failed", "skipped"))
    return checks


def measure(name: str, full: bool, until: float | None, only: Sequence[str] | None = None) -> int:
    """Runs the cases of one suite in this process: those whose names fit a pattern, what has no record first."""
    # What a case calls float32 has IEEE products; cuDNN would take tf32.
    torch.backends.cudnn.allow_tf32 = False
    suite, path = SUITES[name](), folder() / f"{name}.jsonl"
    done = finished(load(path), DEVICE) if path.exists() else set()
    selection = select(suite, DEVICE, done=done if full else ())
    cases = [case for case in selection.cases if not only or any(fnmatchcase(case.name, pattern) for pattern in only)]
    cases.sort(key=lambda case: case.name in done)
    for reason, number in Counter(selection.left_out.values() if full else ()).items():
        print(f"{name}: {number} case{'' if number == 1 else 's'} left out, {reason}", flush=True)
    runner = Runner(suite, Context(DEVICE))
    run(runner, cases, path, lambda text, wrong: print(text, flush=True), deadline=until)
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


def _suite(
    name: str, report: Report, *, full: bool = False, until: float | None = None, only: Sequence[str] | None = None
) -> None:
    """Runs a suite in a process of its own and adds what came of it to the report."""
    if importlib.util.find_spec(NEEDS.get(name, "torch")) is None:
        report.notes.append(f"{name}: left out, {NEEDS[name]} is not installed")
        return
    limit = None if until is None else until - time.monotonic()
    if limit is not None and limit <= 0:
        report.notes.append(f"{name}: left out, no time is left")
        return
    path = folder() / f"{name}.jsonl"
    before = len(load(path)) if path.exists() else 0
    command = [sys.executable, "-m", "benchmarks.gpu", "--suite", name]
    command += ["--full"] if full else []
    command += [] if until is None else ["--until", str(until)]
    command += [f"--only={pattern}" for pattern in only or ()]
    code = run_within(command, limit)
    if code is None:
        report.notes.append(f"{name}: cut, its time was over")
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
    if options.cases:
        return f"the cases {options.cases!r} of the suites {_SUITES}"
    return f"the {len(PLAN)} steps that --plan shows"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--plan", action="store_true", help="show the steps and their seconds, and run nothing")
    parser.add_argument("--compile-ahead", action="store_true", help="pack the smoke tests' kernels, without a device")
    parser.add_argument("--cases", metavar="PATTERN", help="the suites' cases of such names instead of the plan")
    parser.add_argument("--full", action="store_true", help="the long grid instead of the plan; resumes")
    parser.add_argument("--sanitize", action="store_true", help="the tests marked sanitizer under compute-sanitizer")
    # Of the processes that this one starts: clocks of one machine's processes agree.
    parser.add_argument("--suite", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--only", action="append", help=argparse.SUPPRESS)
    parser.add_argument("pytest", nargs="*", help="after --: further arguments for pytest")
    return parser


if __name__ == "__main__":
    sys.exit(main())
