"""`dsd-fast bench` and `dsd-fast bench-docs`, on a tiny suite."""

import json

import pytest
import torch
from PIL import Image

from dsd_fast.bench import Case, Figure, Quality, measure, suites
from dsd_fast.bench.records import append, load
from tests.bench.tiny_suite import suite

GOOD = dict.fromkeys(("wrong", "error"))


@pytest.fixture
def tiny(monkeypatch):
    """The tiny suite as the only one, on a machine whose peaks are measured quickly; returns how to change it."""
    monkeypatch.setattr(measure, "_SIZES", {"cpu": (64, 1 << 16)})

    def use(**changes):
        monkeypatch.setattr(suites, "SUITES", {"tiny": lambda: suite(**changes)})

    use(**GOOD)
    return use


def test_a_good_run(cli, tiny, tmp_path):
    done = cli("bench", "tiny", "--repeats", 6, "--threads", 1)
    assert done.exit_code == 0, done.stderr
    made = load(tmp_path / "benchmarks/results/tiny.jsonl")
    names = ["product/8", "product/4", "ladder, in two halves", "ladder, at once", "share, size = 1", "share, size = 2"]
    assert [record["name"] for record in made] == names
    for name in names:
        assert name in done.stdout
    assert made[0]["command"] == "dsd-fast bench tiny --only product/8 --device cpu --threads 1 --repeats 6"
    assert made[0]["subject"]["repeats"] == 6
    assert "6 records appended to benchmarks/results/tiny.jsonl" in done.stdout
    assert "tiny, 1 of 4: product/8" in done.stderr


def test_records_are_added_and_only_takes_some(cli, tiny, tmp_path):
    for _ in range(2):
        done = cli("bench", "tiny", "--only", "product/*", "--results", "out", "--repeats", 1)
        assert done.exit_code == 0, done.stderr
    names = [record["name"] for record in load(tmp_path / "out/tiny.jsonl")]
    assert names == ["product/8", "product/4"] * 2


def test_json_prints_json_alone(cli, tiny, tmp_path):
    done = cli("bench", "tiny", "--json", "--repeats", 1)
    assert json.loads(done.stdout) == {"records": load(tmp_path / "benchmarks/results/tiny.jsonl")}


def test_a_wrong_result_fails_and_the_others_run(cli, tiny, tmp_path):
    tiny()
    done = cli("bench", "tiny", "--repeats", 1)
    assert done.exit_code == 1
    made = {record["name"]: record["ok"] for record in load(tmp_path / "benchmarks/results/tiny.jsonl")}
    assert [name for name, ok in made.items() if not ok] == ["wrong", "error"]
    assert len(made) == 8
    assert "wrong: at once: largest difference is 1, more than 1e-05, against one by one" in done.stderr
    assert "error: RuntimeError: no such /folder/here" in done.stderr
    assert "/folder" not in (tmp_path / "benchmarks/results/tiny.jsonl").read_text()


def test_a_figure_below_its_floor_fails(cli, tiny):
    low = Quality("low", "share", lambda context: [Figure.share("low", 1, 10, floor=0.2)])
    tiny(**GOOD, low=low)
    done = cli("bench", "tiny", "--only", "low")
    assert done.exit_code == 1
    assert "low is 0.1, below its floor of 0.2" in done.stderr


def test_a_run_is_resumed(cli, tiny, tmp_path):
    assert cli("bench", "tiny", "--only", "product/8", "--repeats", 1).exit_code == 0
    done = cli("bench", "tiny", "--only", "product/*", "--repeats", 1, "--resume")
    assert done.exit_code == 0, done.stderr
    assert "product/8: left out, it has a record of this commit on this device" in done.stderr
    names = [record["name"] for record in load(tmp_path / "benchmarks/results/tiny.jsonl")]
    assert names == ["product/8", "product/4"]
    done = cli("bench", "tiny", "--only", "product/*", "--repeats", 1, "--resume")
    assert done.exit_code == 0
    assert "0 records appended" in done.stdout


def test_cases_for_elsewhere_and_long_ones_are_left_out_and_named(cli, tiny):
    cases = {
        "far": Case("far", "product", lambda context: 1 / 0, devices=("cuda",)),
        "long": Case("long", "product", lambda context: 1 / 0, long=True),
    }
    tiny(**GOOD, **cases)
    done = cli("bench", "tiny", "--only", "[fl]*", "--repeats", 1, "--short")
    assert done.exit_code == 0, done.stderr
    assert "far: left out, it is for cuda" in done.stderr
    assert "long: left out, it is long" in done.stderr
    assert "ladder, at once" in done.stdout


def old_records(tmp_path, **changes):
    """The records of a run before, with another ratio for the first."""
    path = tmp_path / "benchmarks/results/tiny.jsonl"
    first, *others = load(path)
    old = tmp_path / "old.jsonl"
    for record in ({**first, "ratio": first["ratio"] | changes}, *others):
        append(old, record)
    return old


@pytest.mark.parametrize(("factor", "code", "state"), [(100, 1, "worse"), (0.01, 0, "better"), (None, 0, "same")])
def test_a_comparison_fails_on_a_regression_alone(cli, tiny, tmp_path, factor, code, state):
    assert cli("bench", "tiny", "--only", "product/8", "--repeats", 6).exit_code == 0
    (now,) = load(tmp_path / "benchmarks/results/tiny.jsonl")
    ratio = (
        {key: now["ratio"][key] * factor for key in ("median", "low", "high")} if factor else {"low": 0, "high": 1e9}
    )
    old = old_records(tmp_path, **ratio)
    done = cli("bench", "tiny", "--only", "product/8", "--repeats", 6, "--compare", old, "--json")
    assert done.exit_code == code
    (found,) = json.loads(done.stdout)["comparisons"]
    assert (found["name"], found["state"]) == ("product/8", state)
    shown = cli("bench", "tiny", "--only", "product/8", "--repeats", 6, "--compare", old)
    assert shown.exit_code == code
    assert "compared with the old records" in shown.stdout
    assert f"{state} " in shown.stdout


def test_what_cannot_be_compared_is_said_and_is_no_error(cli, tiny, tmp_path):
    assert cli("bench", "tiny", "--only", "product/8", "--repeats", 6).exit_code == 0
    old = old_records(tmp_path)
    done = cli("bench", "tiny", "--only", "product/*", "--repeats", 2, "--compare", old)
    assert done.exit_code == 0
    assert "the new record has too few repeats: its interval covers 50%" in done.stdout
    assert "the old records have it not at all" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["bench", "other"], "suite 'other' is unknown; there are tiny"),
        (["bench", "tiny", "--only", "x*"], "--only 'x*' fits no case of tiny: product/8, product/4, ladder, share"),
        (["bench", "tiny", "--compare", "none.jsonl"], "none.jsonl: No such file or directory"),
        (
            ["bench", "tiny", "--compare", "bad.jsonl"],
            "bad.jsonl, line 1: not JSON (Expecting value: line 1 column 1 (char 0))",
        ),
        (["bench", "tiny", "--results", "bad.jsonl/out", "--only", "share"], "bad.jsonl/out: Not a directory"),
        (["bench-docs"], "--root .: it has no folder benchmarks: documents are made in a checkout"),
    ],
)
def test_what_the_user_got_wrong_is_one_sentence(cli, tiny, tmp_path, arguments, reason):
    (tmp_path / "bad.jsonl").write_text("no record\n")
    done = cli(*arguments)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == f"Error: {reason}"
    assert not (tmp_path / "benchmarks").exists()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device is 'gpu', expected cpu, cuda or cuda:N"),
        ("cuda:99", f"device is 'cuda:99', but torch sees {torch.cuda.device_count()} devices of type 'cuda'"),
    ],
)
def test_a_missing_device_is_one_sentence(cli, tiny, device, message):
    done = cli("bench", "tiny", "--device", device)
    assert (done.exit_code, done.stderr) == (2, f"Error: {message}\n")


@pytest.mark.parametrize(
    "command",
    [
        "bench tiny --only product/8 --repeats 1",
        "match picture.png --caption a --timesteps 2 --official --out out",
        "demo --scenes 1 --reference-scenes 1 --timesteps 2",
    ],
)
def test_what_computes_takes_no_tf32(cli, tiny, tmp_path, monkeypatch, command):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    done = cli(*command.split())
    assert done.exit_code == 0, done.stderr
    assert torch.backends.cudnn.allow_tf32 is False


def test_an_interruption_keeps_what_was_measured(cli, tiny, tmp_path):
    def interrupt(context):
        raise KeyboardInterrupt

    tiny(**{**GOOD, "product/4": Case("product/4", "product", interrupt)})
    done = cli("bench", "tiny", "--repeats", 1)
    assert done.exit_code == 130
    assert [record["name"] for record in load(tmp_path / "benchmarks/results/tiny.jsonl")] == ["product/8"]


def test_documents(cli, tiny, tmp_path):
    assert cli("bench", "tiny", "--repeats", 1).exit_code == 0
    (tmp_path / "README.md").write_text("<!-- bench:tiny/ladder -->\n<!-- /bench:tiny/ladder -->\n")
    done = cli("bench-docs", "--check")
    names = ["benchmarks/results/tiny.csv", "README.md"]
    names += [f"docs/figures/tiny-{name}.svg" for name in ("product", "ladder", "share")]
    assert (done.exit_code, done.stdout.splitlines()) == (1, [f"stale: {name}" for name in names])
    done = cli("bench-docs")
    assert (done.exit_code, done.stdout.splitlines()) == (0, [f"written: {name}" for name in names])
    done = cli("bench-docs", "--check")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "| ladder, at once |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("<!-- bench:tiny/other -->\n<!-- /bench:tiny/other -->\n")
    done = cli("bench-docs")
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: README.md: the marker bench:tiny/other names nothing; there are tiny/empty,")
