"""`dsd-fast evaluate`: the figures of the library, every bad image an error row, and what the files say."""

import csv
import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.matching import Group
from dsd_fast.matching.evaluation import evaluate
from dsd_fast.matching.group_scores import GroupScores
from tests.cli.conftest import CAPTIONS
from tests.cli.test_processes import HEAVY, RUN
from tests.repository.processes import run_python
from tests.repository.source import ROOT

TIMESTEPS = [300, 700]
COMMON = ["--timesteps", "300,700", "--resamples", 50, "--out", "out"]
TEXTS = sorted(set(CAPTIONS))


def matcher(**settings):
    return dsd.Matcher(dsd.load("mini"), dsd.MatchConfig(timesteps=TIMESTEPS, **settings))


def questions(good_images):
    """All three kinds, as rows of a file and as groups."""
    rows = [
        {"image": good_images[0].name, "texts": TEXTS, "label": 1, "category": "texts", "id": "a"},
        {"image": good_images[1].name, "texts": TEXTS[:2], "label": 0, "category": "texts", "id": "b"},
        {"images": [p.name for p in good_images[2:5]], "text": TEXTS[0], "label": 2, "category": "images", "id": "c"},
        {"images": [p.name for p in good_images[:2]], "texts": TEXTS[:2], "category": "", "id": "d"},
    ]
    folder = good_images[0].parent
    groups = [
        Group(
            tuple(folder / name for name in row.get("images", [row.get("image")])),
            tuple(row.get("texts", [row.get("text")])),
            row.get("label", 0),
            row["category"],
            row["id"],
        )
        for row in rows
    ]
    return rows, groups


def write_rows(rows, file="data.jsonl"):
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def results(out="out"):
    return json.loads(Path(out, "results.json").read_text(encoding="utf-8"))


def table(out="out"):
    return pq.read_table(Path(out, "groups.parquet")).to_pylist()


def plain(figures):
    return json.loads(json.dumps({name: asdict(figure) for name, figure in figures.items()}))


def test_figures_are_the_librarys_and_bad_images_error_rows(cli, good_images, tmp_path):
    rows, groups = questions(good_images)
    rows.insert(1, {"image": "missing.png", "texts": TEXTS, "label": 0, "category": "texts", "id": "gone"})
    done = cli("evaluate", write_rows(rows), "--images", good_images[0].parent, *COMMON, "--parts", "--seed", 3)
    assert done.exit_code == 1, done.stderr
    want = evaluate(matcher(seed=3), groups, parts=True, resamples=50)

    content = results()
    assert content["complete"] is True
    assert content["counts"] == {"groups": 5, "scored": 4, "errors": 1, "not_finite": 0, "not_reached": 0}
    assert content["pairs"] == sum(len(group.images) * len(group.texts) for group in groups)
    assert content["figures"] == plain(want.figures)
    assert set(content["figures"]) == {
        "accuracy", "R@1", "mean_reciprocal_rank", "median_rank", "text", "image", "group",
    }  # fmt: skip
    assert content["by_category"] == {name: plain(figures) for name, figures in want.by_category.items()}
    assert content["parts"]["noise"]["figures"] == plain(want.parts["noise"].figures)
    assert list(content["parts"]) == ["attention", "noise"]
    missing = good_images[0].parent / "missing.png"
    assert content["errors"] == [
        {"index": 1, "id": "gone", "reason": "missing", "message": f"{missing} does not exist"}
    ]
    settings = content["settings"]
    assert (settings["model"], settings["timesteps"], settings["seed"]) == ("mini", TIMESTEPS, 3)
    assert (settings["data"], settings["ties"], settings["batch_mean"]) == ("data.jsonl", "wrong", None)
    assert content["versions"]["torch"] == torch.__version__

    entries = table()
    assert [entry["id"] for entry in entries] == ["a", "gone", "b", "c", "d"]
    assert [entry["index"] for entry in entries] == list(range(5))
    assert entries[1]["scores"] is None
    assert (entries[1]["error"], entries[1]["rank"]) == ("missing", None)
    scored = [entry for entry in entries if entry["error"] is None]
    for entry, group, result in zip(scored, groups, want.results, strict=True):
        assert (entry["images"], entry["texts"]) == (len(group.images), len(group.texts))
        assert (entry["label"], entry["rank"], entry["category"]) == (group.label, result.rank, group.category)
        for column, own in (("scores", result), *((f"{name}_scores", part) for name, part in result.parts.items())):
            np.testing.assert_allclose(entry[column], own.scores.flatten(), rtol=1e-5, atol=1e-5)
        right = {name: entry[f"{name}_right"] for name in ("text", "image", "group")}
        assert right == (result.paired or dict.fromkeys(right))
    metadata = pq.read_metadata("out/groups.parquet").metadata
    assert metadata[b"dsd_fast.complete"] == b"true"
    assert json.loads(metadata[b"dsd_fast.config"]) == settings

    low, high = want.figures["accuracy"].bootstrap
    lines = [line.split("│") for line in done.stdout.splitlines() if "accuracy (R@1)" in line]
    assert [cell.strip() for cell in lines[0]][1:6] == [
        "all", "accuracy (R@1)", f"{want.figures['accuracy'].value:.3f}", f"{low:.3f} to {high:.3f}", "3",
    ]  # fmt: skip
    assert all(text in done.stdout for text in ("group score", "noise part alone", "category (none)", "missing"))
    assert "5 groups: 4 scored, 1 error. 12 pairs in" in done.stdout
    assert sorted(os.listdir("out")) == ["groups.parquet", "results.json"]


def test_the_official_conventions(cli, good_images):
    """The official part of a data set in its own format, the official score, batches and ties."""
    folder = Path("vg")
    folder.mkdir()
    for number in range(4):
        # The format names the files .jpg; what they are is read from their content.
        (folder / f"{number}.jpg").write_bytes(good_images[number].read_bytes())
    rows = [("a red circle", n % 4, (n + 1 + n % 2) % 4, ("subject", "object")[n % 2]) for n in range(40)]
    with Path("comvg.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "pos_image_id", "neg_image_id", "neg_value"])
        writer.writerows(rows)
    common = ["evaluate", "comvg.csv", "--format", "comvg", "--images", folder, *COMMON, "--official"]
    done = cli(*common, "--batch-mean", 2, "--ties", "right", "--official-split", "train")
    assert done.exit_code == 0, done.stderr
    groups = [
        Group((folder / f"{right}.jpg", folder / f"{wrong}.jpg"), (text,), 0, category)
        for text, right, wrong, category in rows
    ]
    # 5 % of 40.
    want = evaluate(matcher(official=True), groups[:2], batch_mean=2, ties="right", resamples=50)
    assert results()["figures"] == plain(want.figures)
    for entry, result in zip(table(), want.results, strict=True):
        np.testing.assert_allclose(entry["scores"], result.scores, rtol=1e-5, atol=1e-5)
    settings = results()["settings"]
    assert (settings["batch_mean"], settings["ties"], settings["official_split"]) == (2, "right", "train")
    assert cli(*common, "--official-split", "train", "--limit", 1).exit_code == 0
    assert results()["counts"]["groups"] == 1
    assert cli(*common, "--official-split", "evaluation", "--limit", 3).exit_code == 0
    alone = evaluate(matcher(official=True), groups[:3], resamples=50)
    assert results()["figures"] == plain(alone.figures)
    assert list(results()["by_category"]) == ["object", "subject"]


def test_a_saved_matcher_brings_its_settings(cli, good_images):
    rows, groups = questions(good_images)
    matcher(seed=5, tokens="real", attention_weight=2.0).save("fitted")
    command = ["evaluate", write_rows(rows), "--images", good_images[0].parent, "--matcher", "fitted", "--out", "out"]
    done = cli(*command, "--resamples", 5)
    assert done.exit_code == 0, done.stderr
    want = evaluate(matcher(seed=5, tokens="real", attention_weight=2.0), groups, resamples=5)
    for entry, result in zip(table(), want.results, strict=True):
        np.testing.assert_allclose(entry["scores"], result.scores.flatten(), rtol=1e-5, atol=1e-5)
    assert (results()["settings"]["matcher"], results()["settings"]["tokens"]) == ("fitted", "real")
    assert results()["settings"]["memory_budget"] is None
    # The budget is the device's, and no setting of the score.
    assert cli(*command, "--resamples", 5, "--memory-budget", "64MiB").exit_code == 0
    assert results()["settings"]["memory_budget"] == 64 << 20
    # Given is given, be it the default.
    done = cli(*command, "--timesteps", 10, "--layer", "mid", "--official", "--memory-budget", "64MiB")
    assert done.exit_code == 2
    message = "--matcher brings its own settings, so leave out --timesteps, --layer, --official"
    assert " ".join(done.stderr.split()).endswith(message)
    assert cli(*command[:-4], "--matcher", "nothing", "--out", "other").exit_code == 2


def test_an_interruption_keeps_whole_groups(cli, good_images, monkeypatch):
    def interrupted(m, groups):
        for number, group in enumerate(groups):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield GroupScores(np.ones((1, len(group.texts))), np.zeros((1, len(group.texts))))

    monkeypatch.setattr("dsd_fast.matching.evaluation.score_groups", interrupted)
    rows = [{"image": good_images[0].name, "texts": ["a", "b"], "label": 0}] * 8
    done = cli("evaluate", write_rows(rows), "--images", good_images[0].parent, *COMMON)
    assert done.exit_code == 130, done.stderr
    content = results()
    assert content["complete"] is False
    assert content["counts"] == {"groups": 8, "scored": 3, "errors": 0, "not_finite": 0, "not_reached": 5}
    # Both texts score the same, which is right about none.
    assert content["figures"]["accuracy"]["value"] == 0
    assert len(table()) == 3
    assert pq.read_metadata("out/groups.parquet").metadata[b"dsd_fast.complete"] == b"false"
    assert "5 not reached before the interruption" in done.stdout


def test_scores_that_are_no_numbers_are_wrong_and_the_exit_code_says_so(cli, good_images, monkeypatch):
    def overflowing(m, groups):
        for number, _ in enumerate(groups):
            yield GroupScores(np.array([[1.0, float("nan") if number else 0.5]]), np.zeros((1, 2)))

    monkeypatch.setattr("dsd_fast.matching.evaluation.score_groups", overflowing)
    rows = [{"image": good_images[0].name, "texts": ["a", "b"], "label": 0}] * 2
    done = cli("evaluate", write_rows(rows), "--images", good_images[0].parent, *COMMON)
    assert done.exit_code == 1
    assert results()["counts"]["not_finite"] == 1
    assert results()["figures"]["accuracy"]["value"] == 1 / 2
    assert "1 with scores that are no finite numbers" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "coco"], "format: got 'coco', expected one of comvg"),
        (["--official-split", "train"], "--official-split depends on the data set: give --format too"),
        (["--official-split", "train", "--format", "jsonl"], "format: got 'jsonl', which has no official split"),
        (["--ties", "last"], "ties: got 'last', expected 'wrong' or 'right'"),
        (["--batch-mean", "0"], "Invalid value for '--batch-mean'"),
        (["--batch-mean", "2"], "batch_mean: groups 0 to 1 have 1 images and 2 or 3 texts"),
        (["--limit", "0"], "Invalid value for '--limit'"),
        (["--timesteps", "many"], "--timesteps: 'many' is neither a count nor"),
        (["--timesteps", "0"], "timesteps: got 0"),
        (["--official", "--tokens", "real"], "official: the official score has tokens='all'"),
        (["--model", "./nothing"], "model './nothing' is a folder that does not exist"),
        (["--matcher", "nothing"], "nothing"),
        (["--memory-budget", "1kB"], "memory_budget: 1,000 bytes cannot hold"),
        (["--runtime", "jit"], "runtime: got 'jit', expected 'inductor' or 'cudagraph'"),
        (["--out", "a-file"], "--out a-file cannot be written: it is a file"),
        (["--out", "taken"], "--out taken cannot be written: Is a directory"),
    ],
)
def test_usage_errors_are_one_sentence(cli, good_images, tmp_path, arguments, message):
    Path("a-file").write_text("not a folder")
    Path("taken/results.json").mkdir(parents=True)
    common = [] if "--matcher" in arguments else ["--timesteps", "300,700"]
    file = write_rows(questions(good_images)[0])
    done = cli("evaluate", file, "--images", good_images[0].parent, *common, "--out", "out", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert isinstance(done.exception, SystemExit)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".parquet", ".tmp")]
    assert [path.is_dir() for path in tmp_path.rglob("results.json")] == [True]


def test_a_file_that_is_no_data_set_is_one_sentence(cli):
    Path("data.pkl").write_bytes(b"\x80\x04.")
    for name, message in (("data.pkl", "is a pickle"), ("nothing.csv", "nothing.csv is not a file")):
        done = cli("evaluate", name, *COMMON)
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split())
        assert not Path("out").exists()


def test_start_is_light():
    done = run_python(["-c", RUN.format(heavy=HEAVY), "evaluate", "--help"], cwd=ROOT, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.returncode == 0


def test_conventions_are_refused_before_a_model_is_loaded(cli, good_images, monkeypatch):
    def load(_):
        raise AssertionError("loaded")

    monkeypatch.setattr("dsd_fast.cli.options.ModelOptions.load", load)
    file = write_rows(questions(good_images)[0])
    done = cli("evaluate", file, "--images", good_images[0].parent, *COMMON, "--batch-mean", 4)
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: batch_mean")
