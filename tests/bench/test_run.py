"""Checked before timed; refused when wrong; recorded with all that a reader needs."""

import dataclasses
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from dsd_fast.bench import Case, Context, Figure, Quality, Side, Target, UnavailableError, Work, machine, measure
from dsd_fast.bench.records import append, check, load
from dsd_fast.bench.run import Runner
from tests.bench.tiny_suite import product, suite

PEAKS = {"dtype": "float32", "matmul_flops": 1e6, "copy_bytes": 1e5}
OPTIONS = f"--device cpu --threads {torch.get_num_threads()}"


def runner(chosen, seconds=None, **options):
    """A runner whose timer gives the seconds in turn, and whose peaks are :data:`PEAKS`."""
    given = iter(seconds) if seconds is not None else None

    def timer(run):
        run()
        return 1.0 if given is None else next(given)

    return Runner(chosen, Context(), timer=timer, peaks=lambda dtype: PEAKS, **options)


def run(chosen, name, **options):
    (case,) = [case for case in chosen.cases if case.name == name]
    return [record for record, _ in runner(chosen, **options).run(case)]


def test_a_record_of_speed_by_hand():
    # Baseline 8, 4, 6 and subject 2, 2, 2, in turn.
    (record,) = run(suite(), "product/8", seconds=[8.0, 2.0, 4.0, 2.0, 6.0, 2.0], repeats=3)
    check(record, "record")
    assert record["command"] == f"dsd-fast bench tiny --only product/8 {OPTIONS} --repeats 3"
    names = (record["case"], record["name"], record["group"])
    assert (names, record["ok"], record["reason"]) == (("product/8", "product/8", "product"), True, None)
    flops = 2 * 8 * 16 * 16
    ours, other = record["subject"], record["baseline"]
    assert (ours["name"], ours["median"], ours["p20"], ours["p80"], ours["repeats"]) == ("at once", 2.0, 2.0, 2.0, 3)
    assert (other["name"], other["median"], other["p20"], other["p80"]) == ("one by one", 6.0, 4.8, pytest.approx(7.2))
    assert (ours["batch"], ours["sizes"], other["batch"], other["sizes"]) == (8, {"rows": 8}, 1, {"rows": 8})
    assert (ours["flops"], other["flops"]) == (flops, flops)
    assert ours["matmul_share"] == pytest.approx(flops / 2.0 / 1e6)
    assert other["matmul_share"] == pytest.approx(flops / 6.0 / 1e6)
    moved = 4 * (2 * 8 * 16 + 16 * 16)
    assert (ours["bytes"], other["bytes"], other["copy_share"]) == (moved, None, None)
    assert ours["copy_share"] == pytest.approx(moved / 2.0 / 1e5)
    assert record["ratio"] == {"median": 3.0, "low": 2.0, "high": 4.0, "coverage": 0.75}
    accuracy = record["accuracy"]
    assert 0 <= accuracy.pop("value") < 1e-5
    assert accuracy == {"measure": "largest difference", "tolerance": 1e-5, "oracle": "one by one"}
    assert record["peaks"] == PEAKS
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["versions"] == machine.versions()
    assert record["versions"]["torch"] == torch.__version__


def test_a_side_of_another_type_has_its_own_peak():
    work = product()
    own = dataclasses.replace(work, sides=[work.sides[0], dataclasses.replace(work.sides[1], dtype="bfloat16")])
    made = Runner(
        suite(case=Case("case", "product", lambda context: own)),
        Context(),
        repeats=1,
        timer=lambda run: 1.0,
        peaks=lambda dtype: {**PEAKS, "dtype": dtype, "matmul_flops": {"float32": 1e6, "bfloat16": 4e6}[dtype]},
    )
    ((record, _),) = made.run(made.suite.cases[-1])
    assert record["peaks"]["dtype"] == "bfloat16"
    assert record["baseline"]["matmul_share"] == pytest.approx(record["baseline"]["flops"] / 1e6)
    assert record["subject"]["matmul_share"] == pytest.approx(record["subject"]["flops"] / 4e6)


def test_each_rung_of_a_ladder_is_measured_against_the_one_before():
    records = run(suite(), "ladder", seconds=[8.0, 4.0, 1.0] * 2, repeats=2)
    assert [record["name"] for record in records] == ["ladder, in two halves", "ladder, at once"]
    assert [record["baseline"]["name"] for record in records] == ["one by one", "in two halves"]
    assert [record["ratio"]["median"] for record in records] == [2.0, 4.0]


def compared(**against):
    """Three ways to the same product; each is against what is named."""
    work = product()
    moved = work.sides[1].bytes
    sides = [
        Side(name, work.sides[1].run, 8, {"rows": 8}, moved, flops=1000, against=against.get(name, {}))
        for name in ("a", "b", "c")
    ]
    return Work(sides, work.difference, work.tolerance, "difference", "a", "row", 8)


def records_of(work, seconds):
    return run(suite(case=Case("case", "product", lambda context: work)), "case", seconds=seconds, repeats=1)


def test_sides_against_several_baselines():
    found = records_of(compared(c={"a": (), "b": ()}), [4.0, 3.0, 2.0])
    assert [(r["name"], r["baseline"]["name"], r["ratio"]["median"]) for r in found] == [
        ("case, against a", "a", 2.0),
        ("case, against b", "b", 1.5),
    ]
    found = records_of(compared(b={"a": ()}, c={"a": (), "b": ()}), [4.0, 3.0, 2.0])
    assert [record["name"] for record in found] == ["case, b", "case, c, against a", "case, c, against b"]
    # FLOPs that were given are not counted.
    assert {record["subject"]["flops"] for record in found} == {1000}
    for record in found:
        check(record, "record")


def test_targets_are_recorded_with_what_was_reached():
    targets = [Target("ratio", 2.0), Target("rate", 5.0), Target("copy_share", 0.001), Target("matmul_share", 0.1)]
    (record,) = records_of(compared(c={"a": targets}), [4.0, 3.0, 2.0])
    check(json.loads(json.dumps(record)), "record")
    moved = 4 * (2 * 8 * 16 + 16 * 16)
    assert record["targets"] == {
        "ratio": {"least": 2.0, "value": 2.0, "met": True},
        "rate": {"least": 5.0, "value": 4.0, "met": False},
        "copy_share": {"least": 0.001, "value": pytest.approx(moved / 2.0 / 1e5), "met": True},
        "matmul_share": {"least": 0.1, "value": pytest.approx(1000 / 2.0 / 1e6), "met": False},
    }
    assert record["ok"]
    assert "targets" not in records_of(compared(c={"a": ()}), [4.0, 3.0, 2.0])[0]


def test_a_case_that_cannot_be_run_here_is_no_result():
    def missing(context):
        raise UnavailableError("no library")

    with pytest.raises(UnavailableError, match="no library"):
        run(suite(case=Case("case", "product", missing)), "case", repeats=1)


@pytest.mark.parametrize("launches", [True, False])
def test_a_case_says_whether_launches_count(monkeypatch, launches):
    asked = []

    def timer_for(device, counted=True):
        asked.append((device, counted))
        return lambda call: call() is None or 1.0

    monkeypatch.setattr(measure, "timer_for", timer_for)
    work = dataclasses.replace(product(), launches=launches)
    made = Runner(suite(case=Case("case", "product", lambda context: work)), Context(), peaks=lambda dtype: PEAKS)
    (record,) = [record for record, _ in made.run(made.suite.cases[-1])]
    assert record["ok"]
    assert asked == [("cpu", launches)]


def test_a_wrong_result_is_refused_and_the_others_run():
    chosen = suite()
    made = runner(chosen, repeats=1)
    found = [(record, text) for case in chosen.cases for record, text in made.run(case)]
    for record, _ in found:
        check(record, "record")
    assert {record["name"]: record["kind"] for record, _ in found} == {
        "product/8": "speed",
        "product/4": "speed",
        "wrong": "refused",
        "error": "refused",
        "ladder, in two halves": "speed",
        "ladder, at once": "speed",
        "share, size = 1": "quality",
        "share, size = 2": "quality",
    }
    texts = {record["name"]: (record["reason"], text) for record, text in found if text}
    assert texts["wrong"][0] == texts["wrong"][1]
    assert texts["wrong"][0] == "at once: largest difference is 1, more than 1e-05, against one by one"
    # A message may hold paths, so the record has the kind of error alone.
    assert texts["error"] == ("RuntimeError", "RuntimeError: no such /folder/here")
    assert set(texts) == {"wrong", "error"}


def test_a_wrong_side_is_never_timed():
    timed = []
    made = Runner(suite(), Context(), timer=lambda run: timed.append(run) or 1.0, peaks=lambda dtype: PEAKS)
    (record,) = [record for record, _ in made.run(made.suite.cases[2])]
    assert record["kind"] == "refused"
    assert timed == []


@pytest.mark.parametrize("difference", [float("nan"), 1.1e-5])
def test_a_difference_that_is_no_number_or_too_large_is_wrong(difference):
    work = product()
    work = Work(work.sides, lambda a, b: difference, 1e-5, "difference", "oracle", "row", 8)
    (record,) = run(suite(case=Case("case", "product", lambda context: work)), "case", repeats=1)
    assert record["kind"] == "refused"
    assert record["reason"].startswith(f"one by one: difference is {difference:.3g}, more than 1e-05")


def test_every_side_is_checked_against_the_oracle_not_against_the_baseline():
    both_wrong = [Side("a", lambda: 2.0, 1), Side("b", lambda: 2.0, 1)]
    work = Work(both_wrong, lambda a, b: abs(a - b), 0.5, "difference", "oracle", "row", 8, oracle=lambda: 1.0)
    (record,) = run(suite(case=Case("case", "product", lambda context: work)), "case", repeats=1)
    assert record["reason"] == "a: difference is 1, more than 0.5, against oracle"


def test_figures_of_quality():
    records = run(suite(), "share")
    for record in records:
        check(record, "record")
    assert [(r["name"], r["value"], r["n"], r["chance"], r["sizes"]) for r in records] == [
        ("share, size = 1", 0.6, 100, 0.5, {"size": 1}),
        ("share, size = 2", 0.8, 100, 0.5, {"size": 2}),
    ]
    assert records[0]["command"] == f"dsd-fast bench tiny --only share {OPTIONS}"
    assert records[1]["seconds"] == 0.02


def test_a_figure_below_its_floor_fails():
    figure = Figure.share("q", 6, 10, floor=0.7)
    (record,) = run(suite(q=Quality("q", "share", lambda context: [figure])), "q")
    check(record, "record")
    assert (record["ok"], record["reason"]) == (False, "q is 0.6, below its floor of 0.7")
    assert (record["kind"], record["value"]) == ("quality", 0.6)


def test_a_figure_may_be_in_another_group_of_the_suite():
    figures = [Figure.share("q", 6, 10, group="ladder"), Figure.share("r", 6, 10)]
    records = run(suite(q=Quality("q", "share", lambda context: figures)), "q")
    for record in records:
        check(record, "record")
    assert [record["group"] for record in records] == ["ladder", "share"]
    (record,) = run(suite(q=Quality("q", "share", lambda context: [Figure.share("q", 6, 10, group="none")])), "q")
    assert (record["kind"], record["reason"]) == ("refused", "ValueError")


def test_no_figures_are_no_result():
    (record,) = run(suite(q=Quality("q", "share", lambda context: [])), "q")
    check(record, "record")
    assert (record["kind"], record["reason"]) == ("refused", "no figure was made")


def test_numbers_of_numpy_are_recorded():
    figure = Figure("q", np.float32(0.5), np.float64(0.25), 0.75, np.int64(3), sizes={"size": np.int64(2)})
    (record,) = run(suite(q=Quality("q", "share", lambda context: [figure])), "q")
    check(json.loads(json.dumps(record)), "record")
    assert (record["value"], record["low"], record["n"], record["sizes"]) == (0.5, 0.25, 3, {"size": 2})


def test_records_name_neither_host_nor_paths(tmp_path):
    for name in ("product/8", "error", "share"):
        for record in run(suite(), name, repeats=1):
            append(tmp_path / "tiny.jsonl", record)
    text = (tmp_path / "tiny.jsonl").read_text()
    assert len(load(tmp_path / "tiny.jsonl")) == 4
    for word in (socket.gethostname(), str(Path.home()), str(tmp_path), str(Path.cwd()), "/folder"):
        assert word not in text


def test_flops_of_attention_on_a_cpu_count():
    # torch's own counter has no formula for it: 2 · (Q Kᵀ) + 2 · (P V).
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    result, flops = measure.count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert flops == 2 * 2 * 3 * 5 * 7 * 8 * 2
    torch.testing.assert_close(result, torch.softmax(q @ k.mT / 8**0.5, -1) @ v)


def test_peak_memory_on_a_cpu_is_the_growth():
    size = 64 << 20

    def run():
        torch.zeros(size // 4).add_(1)

    found = measure.peak_memory("cpu", run)
    # Beside it are pages of the allocator's own, and up to 64 pages of each thread that the system counts later.
    assert size - (1 << 20) <= found < size + (8 << 20)
    assert measure.peak_memory("cpu", lambda: None) < 8 << 20


def test_peaks_are_of_this_machine(monkeypatch):
    monkeypatch.setattr(measure, "_SIZES", {"cpu": (64, 1 << 16)})
    seconds = iter([0.5, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0] + [2.0] * 6 + [0.5])
    monkeypatch.setattr(measure, "timer_for", lambda device, launches: lambda run: run() is None or next(seconds))
    found = measure.peaks("cpu", "float32")
    assert found == {"dtype": "float32", "matmul_flops": 2 * 64**3 / 0.25, "copy_bytes": 2 * (1 << 16) / 0.5}


def test_the_commit_is_that_of_the_source_tree():
    head, dirty = machine.commit()
    git = Path(machine.__file__).resolve().parents[2] / ".git"
    assert (head is None) == (not git.exists())
    assert head is None or (len(head) == 40 and isinstance(dirty, bool))


def test_records_are_json():
    (record,) = run(suite(), "product/8", repeats=1)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
