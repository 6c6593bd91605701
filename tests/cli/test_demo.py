"""`dsd-fast demo`, small; how good the model is is not asked here."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dsd_fast as dsd
from dsd_fast.cli.app import app
from dsd_fast.cli.demo import run as demo_run
from dsd_fast.cli.demo.options import LABELS
from dsd_fast.matching.localisation import pointing_game
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from dsd_fast.reference import matching as reference
from tests.cli.test_report import Seen

SMALL = ["demo", "--scenes", 4, "--reference-scenes", 2, "--timesteps", "300,700"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the command said, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "250")
        done = CliRunner().invoke(app, [str(argument) for argument in (*SMALL, "--out", out)])
    assert done.exit_code == 0, done.stderr
    return done, out


def test_demo(demo):
    done, out = demo
    scenes = [scene(EVAL_SEED + i) for i in range(4)]
    captions = [[each.caption, *each.negatives().values()] for each in scenes]
    content = json.loads((out / "results.json").read_text())
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    assert content["counts"] == {"images": 4, "pairs": len(rows)}
    assert [row["caption"] for row in rows] == [text for texts in captions for text in texts]

    matcher = dsd.Matcher(dsd.load("mini"), dsd.MatchConfig(timesteps=[300, 700], official=True))
    noise_matcher = dsd.Matcher(matcher.model, dsd.MatchConfig(timesteps=[300, 700], attention_weight=0))
    for number, (each, texts) in enumerate(zip(scenes, captions, strict=True)):
        picture = np.asarray(Image.open(out / content["images"][number]["path"]))
        assert np.array_equal(picture, each.image)
        own = [row for row in rows if row["image_index"] == number]
        scores = matcher.score([each.image], texts)[0]
        torch.testing.assert_close(torch.tensor([row["score"] for row in own]), scores, rtol=1e-5, atol=1e-5)
        noise = noise_matcher.score([each.image], texts)[0]
        torch.testing.assert_close(torch.tensor([row["noise_score"] for row in own]), noise, rtol=1e-5, atol=1e-5)
        assert [row["kind"] for row in own] == ["true", *each.negatives()]
        ranked = content["images"][number]["ranked"]
        assert [row["caption"] for row in ranked] == [r["caption"] for r in sorted(own, key=lambda row: row["rank"])]
    wanted = reference.score(matcher.model.to_pipeline(), [scenes[1].image], captions[1], timesteps=[300, 700])[0]
    found = [row["reference_score"] for row in rows if row["image_index"] == 1]
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-6, atol=1e-6)
    assert {row["reference_score"] for row in rows if row["image_index"] > 1} == {None}

    compared = content["reference"]
    assert (compared["scenes"], compared["pairs"]) == (2, len(captions[0]) + len(captions[1]))
    assert 0 <= compared["max_difference"] <= 1e-4
    assert f"differ by at most {compared['max_difference']:.1e}" in " ".join(done.stdout.split())


@pytest.mark.parametrize(("score", "column"), [("official", "score"), ("noise", "noise_score")])
def test_accuracy_counts_the_true_captions_wins(demo, score, column):
    done, out = demo
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    scenes = [[row for row in rows if row["image_index"] == number] for number in range(4)]
    figures = json.loads((out / "results.json").read_text())["accuracy"][score]
    assert [figure["against"] for figure in figures] == ["colour", "shape", "swap", "relation", "all"]
    for figure in figures:
        kind = figure["against"]
        wins, chances = [], []
        for own in scenes:
            rivals = [row[column] for row in own[1:] if kind in (row["kind"], "all")]
            if rivals:
                wins.append(own[0][column] > max(rivals))
                chances.append(1 / (1 + len(rivals)))
        assert (figure["right"], figure["n"]) == (sum(wins), len(wins))
        assert figure["accuracy"] == sum(wins) / len(wins)
        assert figure["chance"] == pytest.approx(sum(chances) / len(chances))
        low, high = figure["interval"]
        assert low <= figure["accuracy"] <= high
        assert f"{figure['accuracy']:.2f} ({low:.2f} to {high:.2f})" in done.stdout


def test_words_that_point_and_the_page(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("dsd_fast.cli.demo.run.SHOWN", 3)
    kept, render = [], demo_run.render
    monkeypatch.setattr(demo_run, "render", lambda *given: kept.append(len(given[2])) or render(*given))
    done = cli(*SMALL, "--out", "out")
    # Maps are held of the scenes that are shown alone, however many there are.
    assert kept == [3]
    content = json.loads((tmp_path / "out/results.json").read_text())
    matcher = dsd.Matcher(dsd.load("mini"), dsd.MatchConfig(timesteps=[300, 700]))
    wanted = pointing_game(matcher, [scene(EVAL_SEED + i) for i in range(4)])
    assert [row["word"] for row in content["pointing"]] == list(wanted)
    page = Seen((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    for row in content["pointing"]:
        found = wanted[row["word"]]
        assert (row["right"], row["n"]) == (found.right, found.n)
        assert row["chance"] == pytest.approx(found.chance)
        low, high = row["interval"]
        assert f"{row['accuracy']:.2f} ({low:.2f} to {high:.2f})" in done.stdout
        assert f"{row['accuracy']:.2f} ({low:.2f} to {high:.2f})" in page.text
    for rows in content["accuracy"].values():
        for row in rows:
            low, high = row["interval"]
            assert LABELS[row["against"]] in page.text
            assert f"{row['accuracy']:.2f} ({low:.2f} to {high:.2f})" in page.text
    assert f"differ by at most {content['reference']['max_difference']:.1e}" in page.text
    assert "The first 3 images are shown of 4; 1 more is in" in page.text
    # In each of the three scenes every caption, the true one marked, and a map for each of its words but "a".
    assert [attributes.get("class") for name, attributes in page.tags if name == "li"] == [
        "right" if row["kind"] == "true" else None for entry in content["images"][:3] for row in entry["ranked"]
    ]
    assert page.marked == [word for entry in content["images"][:3] for word in entry["caption"].split() if word != "a"]
    assert f"{content['images'][2]['ranked'][0]['score']:.4f}" in page.text


def test_another_type_is_told_beside_float32(cli, tmp_path):
    done = cli("demo", "--scenes", 1, "--reference-scenes", 1, "--timesteps", "500,", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.stderr
    content = json.loads((tmp_path / "demo/results.json").read_text())
    assert content["settings"]["dtype"] == "bfloat16"
    own = scene(EVAL_SEED)
    captions = [own.caption, *own.negatives().values()]
    wanted = reference.score(dsd.load("mini").to_pipeline(), [own.image], captions, timesteps=[500])[0]
    rows = pq.read_table(tmp_path / "demo/scores.parquet").to_pylist()
    scores, judged = (torch.tensor([row[name] for row in rows]) for name in ("score", "reference_score"))
    torch.testing.assert_close(judged, wanted, rtol=1e-6, atol=1e-6)
    compared = content["reference"]
    assert compared["max_difference"] == pytest.approx(float((scores - judged).abs().max()))
    # 16 bits show, and stay within what they explain.
    assert 1e-4 < compared["max_difference"] <= compared["tolerance"]
    assert f"differ by at most {compared['max_difference']:.1e}" in done.stdout


def test_a_difference_from_the_reference_fails(cli, tmp_path, monkeypatch):
    right = reference.score
    monkeypatch.setattr(reference, "score", lambda *args, **kwargs: right(*args, **kwargs) + 1e-2)
    done = cli(*SMALL)
    assert done.exit_code == 1
    assert "Error: scores differ from the reference's by up to 0.01, more than 0.0001" in done.stderr
    # What was found can be looked at all the same, in the folder that is taken where none is named.
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "report.html", "results.json", "scenes", "scores.parquet",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_written_is_one_sentence(cli, tmp_path):
    (tmp_path / "file").touch()
    done = cli(*SMALL, "--out", "file")
    assert done.exit_code == 2
    assert done.stderr == "Error: --out file cannot be written: it is a file\n"
