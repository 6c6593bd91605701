"""Which cases a run takes, and what it leaves behind when it is cut short."""

import time

import pytest

from dsd_fast.bench import Case, Context, Group, Suite, UnavailableError, machine
from dsd_fast.bench.records import load
from dsd_fast.bench.run import Runner
from dsd_fast.bench.session import finished, run, select
from tests.bench.samples import quality, refused, speed
from tests.bench.tiny_suite import product

PEAKS = {"dtype": "float32", "matmul_flops": 1e6, "copy_bytes": 1e5}


def missing(context):
    raise UnavailableError("no library for it")


SUITE = Suite(
    "tiny",
    [Group("g", "G")],
    [
        Case("both/1", "g", lambda context: product()),
        Case("both/long", "g", lambda context: product(rows=4), long=True),
        Case("cuda/1", "g", lambda context: product(), devices=("cuda",)),
        Case("missing", "g", missing),
    ],
)


def runner(timer=lambda call: call() is None or 1.0):
    return Runner(SUITE, Context(), repeats=2, timer=timer, peaks=lambda dtype: PEAKS)


@pytest.mark.parametrize(
    ("device", "options", "names", "left_out"),
    [
        ("cpu", {}, ["both/1", "both/long", "missing"], {"cuda/1": "it is for cuda"}),
        ("cuda:1", {}, ["both/1", "both/long", "cuda/1", "missing"], {}),
        ("cuda", {"short": True, "only": "*/*"}, ["both/1", "cuda/1"], {"both/long": "it is long"}),
        (
            "cpu",
            {"only": "both/*", "done": {"both/1", "cuda/1"}},
            ["both/long"],
            {"both/1": "it has a record of this commit on this device"},
        ),
        ("cpu", {"only": "none"}, [], {}),
    ],
    ids=["cpu", "cuda", "short", "done", "none"],
)
def test_the_cases_of_a_run(device, options, names, left_out):
    selection = select(SUITE, device, **options)
    assert [case.name for case in selection.cases] == names
    assert selection.left_out == left_out


def test_a_run_records_each_case_when_it_ends(tmp_path):
    path, said, lines = tmp_path / "tiny.jsonl", [], []

    def say(text, wrong):
        said.append((text, wrong))
        lines.append(len(load(path)) if path.exists() else 0)

    made = run(runner(), SUITE.cases[:2] + SUITE.cases[3:], path, say)
    assert load(path) == made
    assert [record["name"] for record in made] == ["both/1", "both/long"]
    assert said == [
        ("tiny, 1 of 3: both/1", False),
        ("tiny, 2 of 3: both/long", False),
        ("tiny, 3 of 3: missing", False),
        ("missing: left out, no library for it", True),
    ]
    assert lines == [0, 1, 2, 2]


def test_no_case_starts_after_the_deadline(tmp_path):
    said = []
    made = run(
        runner(),
        SUITE.cases[:1],
        tmp_path / "tiny.jsonl",
        lambda *line: said.append(line),
        deadline=time.monotonic() - 1,
    )
    assert made == []
    assert said == [("both/1: left out, there is no time left", True)]
    assert not (tmp_path / "tiny.jsonl").exists()


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "tiny.jsonl"

    def interrupted(call):
        if path.exists():
            raise KeyboardInterrupt
        call()
        return 1.0

    cases = SUITE.cases[:2]
    with pytest.raises(KeyboardInterrupt):
        run(runner(interrupted), cases, path, lambda *line: None)
    done = finished(load(path), "cpu")
    assert done == {"both/1"}
    rest = select(SUITE, "cpu", done=done, only="both/*").cases
    assert [case.name for case in rest] == ["both/long"]
    run(runner(), rest, path, lambda *line: None)
    assert [record["name"] for record in load(path)] == ["both/1", "both/long"]
    assert finished(load(path), "cpu") == {"both/1", "both/long"}


def test_what_counts_as_finished():
    head, dirty = machine.commit()
    here = {"machine": machine.describe("cpu"), "environment": machine.environment(), "commit": head, "dirty": dirty}
    other = here["machine"] | {"name": "Another"}
    records = [
        speed("good") | here,
        quality("figure") | here,
        refused("wrong") | here,
        speed("other commit") | here | {"commit": "0" * 40},
        speed("other state") | here | {"dirty": not dirty},
        speed("other machine") | here | {"machine": other},
        speed("other backend") | here | {"environment": "DSD_FAST_BACKEND=reference"},
    ]
    assert finished(records, "cpu") == {"good", "figure"}
