"""`dsd-fast match --heatmaps` and `--report`: the files, their arrays, and the page."""

import gc
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import dsd_fast as dsd
from dsd_fast.cli.match.report import MatchReport
from dsd_fast.engine import items
from dsd_fast.images.panel import panel
from dsd_fast.matching.heatmaps import map_layers
from dsd_fast.unet import UNetProgram
from tests.cli.test_match import COMMON, TIMESTEPS, caption_options, results, shown, zeros
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
    assert {"report.html", "results.json", "scores.parquet"} < set(shown("out"))
    page = Seen(Path("out/report.html").read_text(encoding="utf-8"))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2
    assert "2 images scored with 3 captions by mini." in page.text


def test_the_page_has_the_first_images_and_says_so(cli, good_images, monkeypatch):
    monkeypatch.setattr(dsd.Matcher, "_scores", zeros)
    monkeypatch.setattr("dsd_fast.cli.match.report.SHOWN", 4)
    done = cli("match", *[good_images[0]] * 9, "--caption", "a red ring", *COMMON, "--out", "out", "--heatmaps", 1)
    assert done.exit_code == 0, done.stderr
    page = Seen(Path("out/report.html").read_text(encoding="utf-8"))
    assert len([tag for tag, _ in page.tags if tag == "article"]) == 4
    assert "The first 4 images are shown of 9; 5 more are in results.json and scores.parquet." in page.text
    # The files are of all of them.
    assert len(list(Path("out/heatmaps").iterdir())) == 18


def test_a_page_of_large_pictures_holds_text_alone(cli, good_images, tmp_path, monkeypatch):
    """Pixels of a page's pictures would be gigabytes; and an image's captions share the words that are shown."""

    def pictures():
        gc.collect()
        return sum(issubclass(type(thing), Image.Image) for thing in gc.get_objects())

    def page(report):
        return Seen(report.page(summary).decode())

    monkeypatch.setattr("dsd_fast.cli.match.report._WORDS", 4)
    matcher = dsd.Matcher(dsd.load("mini"), dsd.MatchConfig(timesteps=TIMESTEPS))
    report = MatchReport(tmp_path, matcher, 3)
    rows = [{"caption": caption, "score": 1.0} for caption in ("a red ring", "a blue cross", "a green ring")]
    before = pictures()
    for index in range(2):
        report.add(index, good_images[0], "picture", [dict(row) for row in rows], 0.0, 1.0)
    assert pictures() == before
    summary = {
        "counts": {"scored": 2, "captions": 3, "errors": 0, "not_reached": 0}, "complete": True, "errors": [],
        "settings": {"model": "mini", "layers": []}, "versions": {},
    }  # fmt: skip
    assert page(report).marked == ["a", "red", "ring", "a"] * 2
    assert page(report).text.count("The maps of 2 more words are in the files.") == 2
    assert page(report).text.count("The maps of 3 words are in the files.") == 2
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_a_budget_too_small_for_the_maps_is_found_before_scoring(cli, good_images, tmp_path):
    model = dsd.load("mini")
    program = UNetProgram(model.unet)
    plan, states = program.plan(maps=map_layers(program, "up-finest")), model.encode_prompts(["a red ring"]).states
    # A byte too few for the three words, and more than a score needs that stops in the middle of the network.
    budget = plan.run_bytes(1, 16, 16, 24, map_tokens=3) + plan.encode_text(states).nbytes - 1
    command = [
        "match", good_images[0], "--caption", "a red ring", *COMMON, "--noise-weight", 0, "--layer",
        program.score_ids[0], "--memory-budget", budget, "--out", "out",
    ]  # fmt: skip
    done = cli(*command, "--heatmaps", 1)
    assert done.exit_code == 2
    assert f"Error: --heatmaps: memory_budget: {budget:,} bytes cannot hold" in done.stderr
    assert "images" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert cli(*command).exit_code == 0


def test_words_without_places_are_found_before_scoring(cli, good_images, tmp_path, monkeypatch):
    monkeypatch.setattr(type(dsd.load("mini").tokenizers[0]), "is_fast", False)
    command = ["match", good_images[0], "--caption", "a red ring", *COMMON, "--out", "out"]
    done = cli(*command, "--heatmaps", 1)
    assert done.exit_code == 2
    assert "Error: --heatmaps: tokenizer: " in done.stderr
    assert "images" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert cli(*command).exit_code == 0


def test_a_later_run_takes_the_place_of_all_that_an_earlier_one_left(cli, good_images, tmp_path, monkeypatch):
    # Two files of different pictures.
    one, other = good_images[0], good_images[-1]
    out, command = tmp_path / "out", ["match", "--caption", "a ring", "--caption", "a cross", *COMMON, "--out", "out"]

    def found():
        """The results, but for the job's own files."""
        given = [out / name for name in ("report.html", "results.json", "scores.parquet")]
        there = [path for path in [*given, *out.glob("heatmaps/*")] if path.exists()]
        return {str(path.relative_to(out)): path.read_bytes() for path in there}

    assert cli(*command, one, other, "--heatmaps", 2).exit_code == 0
    (out / "heatmaps/notes.txt").write_text("not ours")
    first = found()
    assert len(first) == 3 + 2 * 2 * 2 + 1

    # A run that fails in its middle, when it has made other maps, leaves the whole set.
    with monkeypatch.context() as patch:
        heatmaps, calls = dsd.Matcher.heatmaps, []

        def fails(self, image, captions):
            calls.append(image)
            if len(calls) == 2:
                raise MemoryError
            return heatmaps(self, image, captions)

        patch.setattr(dsd.Matcher, "heatmaps", fails)
        done = cli(*command, other, one, "--heatmaps", 1)
    assert done.exit_code == 2
    assert found() == first

    # What a kill inside the writing leaves is removed.
    (out / ".heatmaps.0123abcd.tmp").mkdir()
    (out / ".results.json.0123abcd.tmp").touch()
    assert cli(*command, other, "--heatmaps", 1).exit_code == 0
    second = found()
    assert sorted(second) == [
        "heatmaps/00000-1.png", "heatmaps/00000-1.safetensors", "heatmaps/notes.txt", "report.html", "results.json",
        "scores.parquet",
    ]  # fmt: skip
    assert second["report.html"] != first["report.html"]
    assert second["heatmaps/00000-1.png"] != first["heatmaps/00000-1.png"]
    assert not list(out.glob(".*.tmp"))

    assert cli(*command, other).exit_code == 0
    assert sorted(found()) == ["heatmaps/notes.txt", "results.json", "scores.parquet"]
    (out / "heatmaps/notes.txt").unlink()
    assert cli(*command, other).exit_code == 0
    assert sorted(found()) == ["results.json", "scores.parquet"]
    assert not (out / "heatmaps").exists()


def test_heat_maps_do_not_count_as_scoring(cli, good_images, tmp_path, monkeypatch):
    def slow(self, image, captions):
        time.sleep(0.3)
        return [[] for _ in captions]

    monkeypatch.setattr(dsd.Matcher, "_scores", zeros)
    monkeypatch.setattr(dsd.Matcher, "heatmaps", slow)
    command = ["match", *good_images[:3], "--caption", "a ring", *COMMON, "--out", "out"]
    done = cli(*command, "--heatmaps", 1)
    assert done.exit_code == 0, done.stderr
    content = results(tmp_path / "out")
    assert content["seconds"] < 0.3
    assert content["heatmap_seconds"] >= 0.9
    assert f"3 pairs in {content['seconds']:.1f} s ({3 / content['seconds']:.1f} pairs/s), heat maps in " in done.stdout
    assert f"heat maps in {content['heatmap_seconds']:.1f} s. Results: out" in done.stdout
    done = cli(*command)
    assert results(tmp_path / "out")["heatmap_seconds"] == 0
    assert "heat maps" not in done.stdout


def test_a_file_that_has_gone_since_it_was_scored(cli, good_images, tmp_path, monkeypatch):
    picture = tmp_path / "picture.png"
    picture.write_bytes(good_images[0].read_bytes())
    scores = dsd.Matcher._scores

    def then_remove(self, images, texts, together):
        for found in scores(self, images, texts, together=together):
            picture.unlink()
            yield found

    monkeypatch.setattr(dsd.Matcher, "_scores", then_remove)
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
    scores = dsd.Matcher._scores

    def interrupted(self, images, texts, together):
        yield next(scores(self, images, texts, together=together))
        signal.raise_signal(signal.SIGINT)
        yield 1, torch.zeros(1)

    monkeypatch.setattr(dsd.Matcher, "_scores", interrupted)
    done = cli("match", *good_images[:3], "--caption", "a ring", *COMMON, "--out", "out", "--report")
    assert done.exit_code == 130
    assert "Interrupted: 2 images not reached." in Path("out/report.html").read_text(encoding="utf-8")


def test_interruptions_after_scoring_lose_no_scores(cli, good_images, tmp_path, monkeypatch):
    def interrupted(self, image, captions):
        signal.raise_signal(signal.SIGINT)
        return [[] for _ in captions]

    monkeypatch.setattr(dsd.Matcher, "_scores", zeros)
    command = ["match", *good_images[:3], "--caption", "a ring", *COMMON, "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(dsd.Matcher, "heatmaps", interrupted)
        done = cli(*command, "--heatmaps", 1)
    assert done.exit_code == 130
    assert "3 images: 3 scored, 0 errors. " in done.stdout
    assert "not all heat maps in " in done.stdout
    content = results(tmp_path / "out")
    assert (content["complete"], content["counts"]["scored"]) == (False, 3)
    assert ["heatmap" in entry["ranked"][0] for entry in content["images"]] == [True, False, False]
    assert "Interrupted: heat maps are missing." in Path("out/report.html").read_text(encoding="utf-8")
    assert cli(*command).exit_code == 0

    # While the files are looked at again, of which none is to be scored.
    digest = items.file_digest

    def again(path):
        signal.raise_signal(signal.SIGINT)
        return digest(path)

    before = (tmp_path / "out/results.json").read_bytes()
    monkeypatch.setattr(items, "file_digest", again)
    done = cli(*command)
    assert (done.exit_code, done.stdout) == (130, "")
    assert (tmp_path / "out/results.json").read_bytes() == before
