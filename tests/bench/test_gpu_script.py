"""`make gpu`: what it says without a GPU, what its table shows, and when it fails."""

import json
import math
import os
import time
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from dsd_fast.bench import measure, suites
from dsd_fast.bench.records import load
from tests.bench.samples import refused, speed
from tests.bench.tiny_suite import suite
from tests.repository.processes import run_python
from tests.repository.source import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the 10 steps that --plan shows would have run"),
        (
            ["--cases", "tune/*"],
            "the cases 'tune/*' of the suites ops, unet, features, fit, generate, tokens and prompts would have run",
        ),
        (["--full"], "all cases of the suites ops, unet, features, fit, generate, tokens and prompts would have run"),
        (["--sanitize", "--", "-k", "x"], "the tests marked sanitizer under compute-sanitizer would have run"),
    ],
)
def test_without_a_gpu_it_says_what_would_have_run(capsys, arguments, said):
    assert gpu.main(arguments) == 2
    assert capsys.readouterr().err == f"No CUDA device is here; {said}.\n"


def test_it_needs_neither_diffusers_nor_the_command_line(tmp_path):
    # What a module of None says is that it must not be imported.
    code = """
import sys
sys.path.insert(0, sys.argv[1])
for name in ("diffusers", "transformers", "peft", "typer", "rich", "pyarrow", "matplotlib", "sklearn", "safetensors"):
    sys.modules[name] = None
import benchmarks.gpu
from dsd_fast.bench.suites import SUITES
print([case.name for case in SUITES["ops"]().cases][:1])
"""
    assert run_python(["-c", code, str(ROOT)], cwd=tmp_path).stdout == "['cpu/forward/width-40']\n"


OUTCOMES = """
import pytest
def test_good(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip(reason="no CUDA device")
def test_left_out(): pass
@pytest.fixture
def ends_badly():
    yield
    raise OSError("late")
def test_ends_badly(ends_badly): pass
def test_cut():
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_outcomes_are_on_disk_when_pytest_is_killed(tmp_path):
    (tmp_path / "test_it.py").write_text(OUTCOMES)
    (tmp_path / "test_broken.py").write_text("import nothing_of_that_name")
    file, arguments = tmp_path / "lines", ["-m", "pytest", "-p", "benchmarks.outcomes", "-p", "no:cacheprovider", "-q"]
    arguments += ["--continue-on-collection-errors", f"--outcomes={file}", str(tmp_path)]
    assert run_python(arguments, cwd=tmp_path, path=[ROOT], check=False).returncode == -9
    checks = gpu.count(file.read_text())
    assert (checks.passed, checks.failed, checks.skipped) == (1, 3, 1)
    broken, wrong, late = checks.first
    assert broken.startswith("failed: test_broken.py: ")
    assert wrong == "failed: test_it.py::test_wrong: assert 1 == 2"
    assert late == "failed: test_it.py::test_ends_badly: OSError: late"
    assert str(checks).splitlines()[0] == "checks: 1 passed, 3 failed, 1 skipped"
    assert not checks.good
    assert gpu.Checks(passed=1).good
    trouble = gpu.Checks(trouble="pytest ended with 4")
    assert (str(trouble), trouble.good) == ("checks: 0 passed, 0 failed, 0 skipped; pytest ended with 4", False)


TARGETS = {
    "ratio": {"least": 1.05, "value": 4.0, "met": True},
    "rate": {"least": 450.0, "value": 32.0, "met": False},
}


def test_the_table_by_hand():
    ours = speed()["subject"] | {"copy_share": 0.61}
    records = [speed(targets=TARGETS, subject=ours), speed("product/4"), refused("wrong")]
    report = gpu.Report(gpu.Checks(3, 0, 1), records, ["a note"], ["unet"])
    *first, head, rule, one, two, three = report.text().splitlines()
    assert first == ["a note", "unet: its process ended before its cases did", "checks: 3 passed, 0 failed, 1 skipped"]
    columns = [head.index(name) for name in ("case", "time ", "against", "times", "of matmul", "of copy", "target")]
    # Each column is as wide as its widest cell and has two spaces behind it.
    assert [start - 2 for start in columns[1:]] == [
        end for end in range(len(rule)) if rule[end : end + 2] == "  " and rule[end - 1] == "-"
    ]

    def cells(line):
        return [line[start:end].rstrip() for start, end in zip(columns, [*columns[1:], None], strict=True)]

    said = "1.05 times faster: met; 450 a second: not met"
    assert cells(one) == ["tiny: product/8: at once", "250 ms", "one by one", "4.00", "50%", "61%", said]
    assert cells(two) == ["tiny: product/4: at once", "250 ms", "one by one", "4.00", "50%", "-", "-"]
    assert cells(three) == ["wrong", *["-"] * 5, "no result: at once: largest difference is 1"]


GOOD = gpu.Checks(passed=1)


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (gpu.Report(GOOD, [speed(targets=TARGETS)], ["unet: left out, diffusers is not installed"]), 0),
        (gpu.Report(None, [speed()]), 0),
        (gpu.Report(gpu.Checks(1, 1), [speed()]), 1),
        (gpu.Report(GOOD, [speed(), refused()]), 1),
        (gpu.Report(GOOD, [speed()], faults=["ops"]), 1),
    ],
    ids=["a missed target and a note", "no checks", "a failed test", "a wrong result", "a fault"],
)
def test_what_fails(report, code):
    assert report.code == code
    # Whatever failed, there is a table.
    assert report.text().splitlines()[-len(report.records) - 2].startswith("case ")


def test_a_suite_is_measured_and_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(measure, "_SIZES", {"cpu": (64, 1 << 16)})
    monkeypatch.setitem(suites.SUITES, "tiny", lambda: suite(wrong=None, error=None, share=None))
    assert gpu.measure("tiny", full=True, until=None) == 0
    made = load(tmp_path / "tiny.jsonl")
    assert [record["case"] for record in made] == ["product/8", "product/4", "ladder", "ladder"]
    assert made[0]["command"].startswith("dsd-fast bench tiny --only product/8 --device cpu --threads ")
    capsys.readouterr()
    assert gpu.measure("tiny", full=True, until=None) == 0
    assert capsys.readouterr().out == "tiny: 3 cases left out, it has a record of this commit on this device\n"
    assert load(tmp_path / "tiny.jsonl") == made
    # A short run measures anew.
    assert gpu.measure("tiny", full=False, until=None) == 0
    assert len(load(tmp_path / "tiny.jsonl")) == 2 * len(made)


def test_records_are_json_lines_in_the_folder_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    assert gpu.folder() == ROOT / "benchmarks/results"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.folder() == tmp_path
    assert json.loads(json.dumps(speed(targets=TARGETS))) == speed(targets=TARGETS)


def test_a_case_without_a_record_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(measure, "_SIZES", {"cpu": (64, 1 << 16)})
    monkeypatch.setitem(suites.SUITES, "tiny", lambda: suite(wrong=None, error=None, share=None))
    assert gpu.measure("tiny", full=False, until=None, only=["product/8"]) == 0
    assert gpu.measure("tiny", full=False, until=None, only=["product/*"]) == 0
    names = [record["case"] for record in load(tmp_path / "tiny.jsonl")]
    assert names == ["product/8", "product/4", "product/8"]


def test_the_plan_is_shown_and_keeps_within_eight_minutes(capsys):
    assert gpu.main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[11:33].strip() for line in lines] == [step.name for step in gpu.PLAN]
    assert lines[0].startswith("  0- 15 s  machine")
    end = sum(step.seconds for step in gpu.PLAN)
    assert lines[-1].startswith(f"{end - gpu.PLAN[-1].seconds}-{end} s")
    assert sum(step.seconds for step in gpu.PLAN) <= gpu.MOST_SECONDS


def test_the_plans_cases_are_there_and_compile_nothing_of_diffusers():
    for step in gpu.PLAN:
        for name, patterns in step.cases.items():
            cases = [case.name for case in suites.SUITES[name]().cases]
            chosen = {pattern: [case for case in cases if fnmatchcase(case, pattern)] for pattern in patterns}
            assert all(chosen.values()), chosen
            taken = [case for names in chosen.values() for case in names]
            assert not any("against-" in case and "official" not in case for case in taken)


def test_a_table_comes_after_each_step_and_what_one_leaves_the_next_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "CACHE", tmp_path / "none")
    limits, now = [], time.monotonic()

    def run_within(command, seconds):
        limits.append(seconds)
        if "pytest" in command:
            file = Path(next(part for part in command if part.startswith("--outcomes=")).removeprefix("--outcomes="))
            lines = [{"test": f"{number}", "outcome": outcome, "why": ""} for number, outcome in enumerate(OUTCOME)]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            return None
        return 0

    monkeypatch.setattr(gpu, "run_within", run_within)
    steps = [
        gpu.Step("machine", 10),
        gpu.Step("smoke", 60, "gpu and smoke"),
        gpu.Step("cases", 30, cases={"ops": ["*"], "unet": ["*"]}),
    ]
    assert gpu.follow(steps) == 1
    said = capsys.readouterr().out
    tables = said.split("\n== ")[1:]
    assert [table.splitlines()[0] for table in tables] == [
        "machine, planned until 10 s",
        "smoke, planned until 70 s",
        "cases, planned until 100 s",
    ]
    assert "checks: 2 passed, 1 failed, 1 skipped; they did not end in time\nfailed: 2: " in tables[1]
    assert "no case gave a record" in tables[2]
    # Nothing took any time, so the first suite has half of all that is left and the second the rest.
    spent = time.monotonic() - now
    for limit, planned in zip(limits, (70, 50, 100), strict=True):
        assert planned - spent <= limit <= planned


def test_what_a_cut_step_has_started_ends_with_it(tmp_path):
    file = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 60 & echo $! > {file}; wait"]
    assert gpu.run_within(["sh", "-c", "exit 3"], 10.0) == 3
    assert gpu.run_within(command, 1.0) is None
    status = Path(f"/proc/{file.read_text().strip()}/stat")
    # It may wait for somebody to ask for its exit code.
    ended = time.monotonic() + 5
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < ended
        time.sleep(0.05)


OUTCOME = ("passed", "passed", "failed", "skipped")


def test_kernels_compiled_elsewhere_are_shipped(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    (tmp_path / "cache/KEY").mkdir(parents=True)
    (tmp_path / "cache/KEY/kernel.cubin").write_bytes(b"code")
    archive = tmp_path / "cache.tar.gz"
    assert gpu.unpack(archive) == "kernels are compiled here"
    gpu.pack(tmp_path / "cache", archive)
    assert gpu.unpack(archive) == "1 kernels come from cache.tar.gz, if they fit"
    assert (Path(os.environ["TRITON_CACHE_DIR"]) / "KEY/kernel.cubin").read_bytes() == b"code"


def test_the_smoke_tests_compile_what_their_step_has_time_for(monkeypatch):
    """Triton's own JIT decides what to compile, for a GPU that is not there; the compiler itself is left out."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("interpreted kernels are not compiled")
    from dsd_fast.kernels.common import kernel as common
    from tests.gpu.smoke import ATTENTION
    from tests.kernels.driver import PROCESSORS, absent_gpu

    compiled = []

    def compile(src, target=None, options=None, **_):
        compiled.append(src.name)
        return SimpleNamespace(
            run=lambda *_: None, launch_metadata=lambda *_: None, function=None, packed_metadata=None, name=src.name
        )

    monkeypatch.setattr(triton.compiler, "compile", compile)
    monkeypatch.setattr(common, "processors", lambda device: PROCESSORS)
    each = []
    with absent_gpu():
        for problem in ATTENTION:
            before = len(compiled)
            problem.launch("cpu")
            each.append(len(compiled) - before)
    smoke = next(step for step in gpu.PLAN if step.name == "smoke")
    # Each test is one process's; none compiles what another has, save where two begin at once.
    assert 0 < max(each) <= 6
    assert len(compiled) <= 26
    assert max(each) * gpu.COMPILATION <= smoke.seconds
    assert len(compiled) * gpu.COMPILATION / gpu.PROCESSES <= smoke.seconds


def test_the_smoke_set_is_small():
    from tests.gpu import test_smoke

    marked = [file.name for file in (ROOT / "tests").rglob("test_*.py") if "mark.smoke" in file.read_text()]
    assert set(marked) == {"test_smoke.py", Path(__file__).name}
    tests = [value for name, value in vars(test_smoke).items() if name.startswith("test_")]
    marks = [[mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"] for test in tests]
    assert 10 <= sum(math.prod(len(mark.args[1]) for mark in own) for own in marks) <= 40


def test_sanitizing_needs_the_tool(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "SANITIZER", tmp_path / "none")
    assert gpu.sanitize([]) == 2
    assert capsys.readouterr().err == "compute-sanitizer is not installed: nothing was checked.\n"


@pytest.mark.parametrize("codes", [(0, 0), (0, 1)])
def test_sanitizing_runs_both_tools_on_the_marked_tests(monkeypatch, tmp_path, codes):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> {tmp_path}/calls\n'
        f"test $2 = memcheck && exit {codes[0]}\nexit {codes[1]}\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu.sanitize(["-k", "x"]) == max(codes)
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[:3] for call in calls] == [["1", "--tool", "memcheck"], ["1", "--tool", "racecheck"]]
    assert " ".join(calls[0]).endswith("-m pytest -m gpu and sanitizer tests/gpu -k x")
