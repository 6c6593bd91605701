"""`dsd-fast match --heatmaps` and `--report`: the files, their arrays, and the page."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import dsd_fast as dsd
from dsd_fast.images.panel import panel
from tests.cli.test_match import COMMON, TIMESTEPS, caption_options, results
from tests.cli.test_report import Seen

CAPTIONS = ["a red <b>circle</b>", "?!", "a small blue square"]


def test_maps_of_the_best_captions(cli, good_images, bad_images, tmp_path):
    bad = next(iter(bad_images))
    images = [good_images[0], bad, good_images[-1]]
    done = cli("match", *images, *caption_options(CAPTIONS), *COMMON, "--out", "out", "--heatmaps", 2, "--top-k", 3)
    assert done.exit_code == 1, done.stderr
    matcher = dsd.Matcher(dsd.load("mini"), dsd.MatchConfig(timesteps=TIMESTEPS))
    content, files = results(tmp_path / "out"), []
    for index in (0, 2):
        rows = content["images"][index]["ranked"]
        assert "heatmap" not in rows[2]
        for rank, row in enumerate(rows[:2], start=1):
            name = f"heatmaps/{index:05d}-{rank}"
            assert row["heatmap"] == {"picture": f"{name}.png", "arrays": f"{name}.safetensors"}
            files += [f"{index:05d}-{rank}.png", f"{index:05d}-{rank}.safetensors"]
            wanted = matcher.heatmap(images[index], row["caption"])
            with safe_open(tmp_path / "out" / row["heatmap"]["arrays"], "np") as arrays:
                metadata = arrays.metadata()
                maps, spans = arrays.get_tensor("maps"), arrays.get_tensor("spans")
            assert (metadata["image"], metadata["caption"]) == (str(images[index]), row["caption"])
            assert json.loads(metadata["words"]) == [word for word, _, _ in wanted]
            assert spans.tolist() == [list(span) for _, span, _ in wanted]
            assert maps.dtype == np.float32
            if wanted:
                np.testing.assert_allclose(maps, np.stack([values for _, _, values in wanted]), rtol=1e-4, atol=1e-7)
            image = dsd.images.load_image(images[index])
            largest = max((float(values.max()) for _, _, values in wanted), default=1e-6)
            sheet = panel(image, row["caption"], [(span, values) for _, span, values in wanted], largest)
            saved = np.asarray(Image.open(tmp_path / "out" / row["heatmap"]["picture"])).astype(int)
            assert saved.shape == np.asarray(sheet).shape
            assert np.abs(saved - np.asarray(sheet)).max() <= 2
    assert sorted(path.name for path in (tmp_path / "out/heatmaps").iterdir()) == sorted(files)
    assert content["settings"]["heatmaps"] == 2

    page = Seen((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    for index in (0, 2):
        for row in content["images"][index]["ranked"]:
            assert row["caption"] in page.text
            assert f"{row['score']:.4f}" in page.text
    assert content["images"][1]["error"]["message"] in page.text
    words = [
        word
        for index in (0, 2)
        for row in content["images"][index]["ranked"][:2]
        for word, _, _ in matcher.heatmap(images[index], row["caption"])
    ]
    assert page.marked == words
    assert "b" not in [tag for tag, _ in page.tags]


def test_the_page_alone(cli, good_images, tmp_path):
    done = cli("match", *good_images[:2], *caption_options(CAPTIONS), *COMMON, "--out", "out", "--report")
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in Path("out").iterdir()) == ["report.html", "results.json", "scores.parquet"]
    page = Seen(Path("out/report.html").read_text(encoding="utf-8"))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2
    assert "2 images scored with 3 captions by mini." in page.text


def test_the_page_has_the_first_images_and_says_so(cli, good_images, monkeypatch):
    def score_iter(self, images, captions):
        for index in range(len(images)):
            yield index, torch.zeros(len(captions))

    monkeypatch.setattr(dsd.Matcher, "score_iter", score_iter)
    monkeypatch.setattr("dsd_fast.cli.match_report.SHOWN", 4)
    done = cli("match", *[good_images[0]] * 9, "--caption", "a red ring", *COMMON, "--out", "out", "--heatmaps", 1)
    assert done.exit_code == 0, done.stderr
    page = Seen(Path("out/report.html").read_text(encoding="utf-8"))
    assert len([tag for tag, _ in page.tags if tag == "article"]) == 4
    assert "The first 4 images are shown of 9; 5 more are in results.json and scores.parquet." in page.text
    # The files are of all of them.
    assert len(list(Path("out/heatmaps").iterdir())) == 18


def test_a_file_that_has_gone_since_it_was_scored(cli, good_images, tmp_path, monkeypatch):
    picture = tmp_path / "picture.png"
    picture.write_bytes(good_images[0].read_bytes())
    score_iter = dsd.Matcher.score_iter

    def then_remove(self, images, captions):
        for found in score_iter(self, images, captions):
            picture.unlink()
            yield found

    monkeypatch.setattr(dsd.Matcher, "score_iter", then_remove)
    done = cli("match", picture, "--caption", "a red ring", *COMMON, "--out", "out", "--heatmaps", 1)
    assert done.exit_code == 0, done.stderr
    assert "heatmap" not in results(tmp_path / "out")["images"][0]["ranked"][0]
    assert "could not be read a second time" in Path("out/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["report.html", "heatmaps"])
def test_a_name_that_is_taken_is_one_sentence(cli, good_images, tmp_path, name):
    if name == "heatmaps":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/heatmaps").touch()
    else:
        (tmp_path / "out/report.html").mkdir(parents=True)
    done = cli("match", good_images[0], "--caption", "a red ring", *COMMON, "--out", "out", "--heatmaps", 1)
    assert done.exit_code == 2
    assert "Error: --out out cannot be written: " in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [name]


def test_an_interrupted_run_says_so_on_its_page(cli, good_images, monkeypatch):
    import signal

    score_iter = dsd.Matcher.score_iter

    def interrupted(self, images, captions):
        yield next(score_iter(self, images, captions))
        signal.raise_signal(signal.SIGINT)
        yield 1, torch.zeros(1)

    monkeypatch.setattr(dsd.Matcher, "score_iter", interrupted)
    done = cli("match", *[good_images[0]] * 3, "--caption", "a ring", *COMMON, "--out", "out", "--report")
    assert done.exit_code == 130
    assert "Interrupted: 2 images not reached." in Path("out/report.html").read_text(encoding="utf-8")
