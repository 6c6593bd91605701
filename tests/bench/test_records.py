"""Records: written whole, read strictly."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from dsd_fast.bench.records import RecordError, append, flat, latest, load
from tests.bench.samples import quality, refused, speed
from tests.repository.source import ROOT

WRITER = """
import sys
from pathlib import Path
from dsd_fast.bench.records import append
from tests.bench.samples import speed
print("ready", flush=True)
number = 0
while True:
    append(Path(sys.argv[1]), speed(command=f"{sys.argv[2]} {number}", reason=None, group="g" * 20_000))
    print(number, flush=True)
    number += 1
"""


def start_writer(path, name):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, path, name],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_append_and_load(tmp_path):
    path = tmp_path / "new/tiny.jsonl"
    made = [speed(), quality(), refused()]
    for record in made:
        append(path, record)
    assert load(path) == made
    assert len(path.read_text().splitlines()) == 3
    assert [file.name for file in path.parent.iterdir()] == ["tiny.jsonl"]


def test_records_of_one_case_are_appended_at_once(tmp_path, monkeypatch):
    path, made = tmp_path / "tiny.jsonl", [speed("a"), speed("b")]
    with pytest.raises(RecordError):
        append(path, speed(), without(speed(), "subject"))
    assert not path.exists()
    append(path, *made)
    append(path)
    assert load(path) == made


def test_a_record_may_have_targets(tmp_path):
    target = {"least": 1, "value": 0.5, "met": False}
    append(tmp_path / "tiny.jsonl", speed(targets={"ratio": target, "copy_share": target}))
    assert load(tmp_path / "tiny.jsonl")[0]["targets"]["ratio"] == target


def test_a_last_line_without_an_end_stays_a_line(tmp_path):
    path = tmp_path / "tiny.jsonl"
    path.write_text(json.dumps(speed()))
    append(path, quality())
    assert load(path) == [speed(), quality()]


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.05])
def test_a_killed_run_leaves_whole_lines_and_all_that_was_said_to_be_done(tmp_path, seconds):
    path = tmp_path / "tiny.jsonl"
    process = start_writer(path, "A")
    assert process.stdout.readline() == "ready\n"
    while process.stdout.readline() != "3\n":
        pass
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    done = 3 + len(process.stdout.read().split())
    process.wait()
    commands = [record["command"] for record in load(path)]
    # One more than was said may be there: it was killed before it could say so.
    assert commands in ([f"A {n}" for n in range(count)] for count in (done + 1, done + 2))


UNFINISHED = """
import os, signal, sys
from pathlib import Path
from dsd_fast.bench.records import append
from tests.bench.samples import speed
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
append(Path(sys.argv[1]), speed())
"""


def test_the_next_append_removes_what_a_killed_one_has_left(tmp_path):
    path = tmp_path / "tiny.jsonl"
    append(path, speed())
    killed = subprocess.run(
        [sys.executable, "-c", UNFINISHED, path], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    append(path, quality())
    assert load(path) == [speed(), quality()]
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.jsonl"]


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "tiny.jsonl"
    writers = {name: start_writer(path, name) for name in "AB"}
    said = {}
    for name, process in writers.items():
        while (line := process.stdout.readline()) != "4\n":
            assert line
        said[name] = 5
    for process in writers.values():
        process.kill()
        process.wait()
    commands = [record["command"] for record in load(path)]
    for name, count in said.items():
        own = [command for command in commands if command.startswith(name)]
        assert len(own) >= count
        assert own == [f"{name} {n}" for n in range(len(own))]


def test_an_append_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "tiny.jsonl"
    append(path, speed())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        append(path, quality())
    assert load(path) == [speed()]
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.jsonl"]


def without(record, *path):
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return record


BAD = [
    ("{", "not JSON"),
    ("[]", "got list, expected an object"),
    (json.dumps(speed(schema=2)), "schema is 2, expected 1"),
    (json.dumps(speed(kind="cost")), "kind is 'cost', expected one of speed, quality, refused"),
    (json.dumps(without(speed(), "ratio")), "ratio is missing"),
    (json.dumps(without(speed(), "subject", "flops")), "subject.flops is missing"),
    (json.dumps(speed(host="x")), "host is unknown"),
    (json.dumps(speed(items="8")), "items is '8', expected int"),
    (json.dumps(speed(items=True)), "items is True, expected int"),
    (json.dumps(speed(dirty=1)), "dirty is 1, expected bool or null"),
    (json.dumps(speed(median=None)), "ratio.median is None, expected int or float"),
    (json.dumps(speed(median=float("nan"))), "ratio.median is nan, expected a finite number"),
    (json.dumps(quality(sizes={"size": 0.5})), "sizes is {'size': 0.5}, expected whole numbers by name"),
    (json.dumps(quality(sizes=[1])), "sizes is [1], expected whole numbers by name"),
    (json.dumps(speed(machine="Processor")), "machine is 'Processor', expected an object"),
    (json.dumps(speed(targets={})), "targets is {}, expected what is to be reached, by measure"),
    (json.dumps(speed(targets={"ratio": {"least": 1}})), "targets.ratio.value is missing"),
    (json.dumps(speed(targets={"ratio": {"least": 1, "value": 1, "met": 1}})), "targets.ratio.met is 1, expected bool"),
    (json.dumps(quality(targets={"ratio": {}})), "targets is unknown"),
    (json.dumps(speed(ok=False)), "ok is False and reason is None, which do not fit"),
    (json.dumps(speed(reason="wrong")), "ok is True and reason is 'wrong', which do not fit"),
    (json.dumps(refused() | {"ok": True, "reason": None}), "ok is True in a record of kind 'refused'"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "tiny.jsonl"
    path.write_text(f"{json.dumps(speed())}\n{line}\n")
    with pytest.raises(RecordError, match=f"^{re.escape(str(path))}, line 2: {re.escape(reason)}"):
        load(path)


def test_a_bad_record_is_not_written(tmp_path):
    with pytest.raises(RecordError, match="record: subject is missing"):
        append(tmp_path / "tiny.jsonl", without(speed(), "subject"))
    assert list(tmp_path.iterdir()) == []


def test_latest_is_the_last_with_a_result_by_name_and_conditions():
    other = speed()["machine"] | {"threads": 1}
    made = [
        speed("a", 1.0, 1.0, 1.0),
        speed("a", 2.0, 2.0, 2.0),
        refused("a"),
        speed("a", 3.0, 3.0, 3.0, machine=other),
    ]
    forced = speed("a", 4.0, 4.0, 4.0, environment="DSD_FAST_BACKEND=reference")
    # A figure below its floor is a result.
    made += [quality("b"), quality("b", value=0.7, low=0.6, high=0.8, ok=False, reason="below"), forced]
    found = latest(made)
    cpu = ("cpu", "Processor")
    assert list(found) == [
        ("a", *cpu, "2", ""),
        ("a", *cpu, "1", ""),
        ("b", *cpu, "2", ""),
        ("a", *cpu, "2", "DSD_FAST_BACKEND=reference"),
    ]
    assert [record.get("ratio", {}).get("median") for record in found.values()] == [2.0, 3.0, None, 4.0]
    assert found[("b", *cpu, "2", "")]["value"] == 0.7


def test_flat_names_nested_fields_by_their_path():
    fields = flat(speed())
    assert fields["ratio.low"] == 3.5
    assert fields["subject.sizes"] == {"rows": 8}
    assert fields["machine.name"] == "Processor"
    assert len(fields) == len(set(fields))
