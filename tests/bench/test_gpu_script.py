"""`make gpu`: what it says without a GPU, what its table shows, and when it fails."""

import json

import pytest
import torch

from benchmarks import gpu
from dsd_fast.bench import measure, suites
from dsd_fast.bench.records import load
from tests.bench.samples import refused, speed
from tests.bench.tiny_suite import suite
from tests.repository.processes import run_python
from tests.repository.source import ROOT

JUNIT = """<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10"/>
<testsuite errors="0" failures="0" skipped="1" tests="4"/></testsuites>"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the tests marked gpu and the short cases of the suites ops, unet, features and fit would have run"),
        (["--full"], "all cases of the suites ops, unet, features and fit would have run"),
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


def test_the_checks_are_counted():
    checks = gpu.count(JUNIT)
    assert (checks.passed, checks.failed, checks.skipped) == (7, 3, 4)
    assert str(checks) == "checks: 7 passed, 3 failed, 4 skipped"
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


def test_a_short_run_keeps_within_eight_minutes():
    assert gpu.SHORT + gpu.GRACE <= 470


def test_what_no_time_is_left_for_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "SHORT", -1)
    assert gpu.main([]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[1:6] == [
        "ops: left out, no time is left",
        "unet: left out, no time is left",
        "features: left out, no time is left",
        "fit: left out, no time is left",
        "checks: 0 passed, 0 failed, 0 skipped; they did not end in time",
    ]


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
