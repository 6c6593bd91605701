"""`dsd-fast match`: every good image scored, every bad one an error row, and what the files say."""

import gc
import json
import os
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.jobs import storable
from tests.cli.conftest import CAPTIONS
from tests.jobs.numbers import files
from tests.tiny import save_tiny_lora, tiny_pipeline

TIMESTEPS = [300, 700]
COMMON = ["--timesteps", "300,700"]


def caption_options(captions=CAPTIONS):
    return [part for caption in captions for part in ("--caption", caption)]


def results(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def zeros(self, images, texts, together):
    """In place of a matcher's scores."""
    for number, _ in enumerate(images):
        yield number, torch.zeros(len(texts))


def shown(out):
    """The names in a folder, but for locks."""
    return sorted(name for name in os.listdir(out) if not name.startswith("."))


def found(out):
    """The files of a folder, but for what may differ from run to run."""
    return {name: content for name, content in files(Path(out)).items() if name != "results.json"}


def wanted(images, captions=CAPTIONS, **settings):
    return dsd.Matcher(dsd.load("mini"), dsd.MatchConfig(timesteps=TIMESTEPS, **settings)).score(images, captions)


def test_bad_images_among_good_ones(cli, good_images, bad_images, tmp_path):
    # A folder stands for the images in it.
    bad = [path for path in bad_images if not path.is_dir()]
    images = [bad[0], *good_images[:3], *bad[1:5], *good_images[3:], *bad[5:]]
    done = cli("match", *images, *caption_options(), *COMMON, "--out", "out", "--top-k", 3)
    assert done.exit_code == 1, done.stderr
    assert isinstance(done.exception, SystemExit)

    content = results(tmp_path / "out")
    assert content["complete"] is True
    assert content["counts"] == {
        "images": len(images),
        "captions": len(CAPTIONS),
        "scored": len(good_images),
        "errors": len(bad),
        "not_reached": 0,
    }
    entries = {Path(entry["path"]): entry for entry in content["images"]}
    assert list(entries) == images
    assert {path: entries[path]["error"]["reason"] for path in bad} == {path: bad_images[path] for path in bad}
    assert all(str(path) in entries[path]["error"]["message"] for path in bad)
    assert all(bad_images[path] in done.stdout for path in bad)

    table = pq.read_table(tmp_path / "out/scores.parquet").to_pylist()
    assert [(row["image_index"], row["caption_index"]) for row in table] == [
        (images.index(path), i) for path in good_images for i in range(len(CAPTIONS))
    ]
    for path in good_images:
        rows = [row for row in table if row["image"] == str(path)]
        alone = wanted([path])[0]
        torch.testing.assert_close(torch.tensor([row["score"] for row in rows]), alone, rtol=1e-5, atol=1e-5)
        best = sorted(rows, key=lambda row: row["rank"])
        assert [row["rank"] for row in best] == [1, 2, 3, 4]
        assert [row["score"] for row in best] == sorted((row["score"] for row in rows), reverse=True)
        assert entries[path]["ranked"] == [
            {name: row[name] for name in ("caption_index", "caption", "score")} for row in best[:3]
        ]
        assert [row["caption"] for row in rows] == CAPTIONS


@pytest.mark.newest
def test_good_images_and_what_the_files_say(cli, good_images, tmp_path):
    done = cli(
        "match", *good_images[:2], good_images[0], "--captions", "c.txt", "--out", "deep/out", "--official", "--seed", 3
    )
    assert done.exit_code == 2
    assert "--captions c.txt cannot be read" in done.stderr
    (tmp_path / "c.txt").write_text("\n".join(CAPTIONS))
    options = ["--captions", "c.txt", "--official", "--memory-budget", "64MiB", *COMMON, "--out", "deep/out"]
    done = cli("match", *good_images[:2], good_images[0], *options, "--seed", 3)
    assert done.exit_code == 0, done.stderr
    # Equal files of one name are one row.
    assert "3 images: 3 scored, 0 errors, 1 duplicate. 8 pairs in" in done.stdout
    before = found("deep/out")
    refused = cli("match", *good_images[:2], *options, "--seed", 4)
    assert refused.exit_code == 2
    assert "--out deep/out holds results made otherwise: seed 3 there, 4 now" in refused.stderr
    assert found("deep/out") == before
    scores = wanted(good_images[:2], official=True, seed=3)
    content, table = results(tmp_path / "deep/out"), pq.read_table(tmp_path / "deep/out/scores.parquet")
    assert shown("deep/out") == ["index", "manifest.json", "results.json", "scores.parquet", "timeline.json"]
    values = torch.tensor(table["score"].to_pylist()).view(3, -1)
    torch.testing.assert_close(values, scores[[0, 1, 0]], rtol=1e-5, atol=1e-5)
    assert str(table.schema.field("score").type) == "float"

    settings = content["settings"]
    assert settings["model"] == "mini"
    assert settings["timesteps"] == TIMESTEPS
    assert (settings["seed"], settings["official"], settings["attention_weight"]) == (3, True, 0.5)
    assert settings["memory_budget"] == 64 << 20
    assert content["versions"]["torch"] == torch.__version__
    metadata = {
        key.decode(): value.decode() for key, value in pq.read_metadata("deep/out/scores.parquet").metadata.items()
    }
    assert metadata["dsd_fast.model"] == "mini"
    assert metadata["dsd_fast.revision"] == ""
    assert metadata["dsd_fast.complete"] == "true"
    assert json.loads(metadata["dsd_fast.config"]) == settings
    assert pq.read_schema("deep/out/scores.parquet").metadata[b"dsd_fast.model"] == b"mini"

    lines = done.stdout.splitlines()
    best = content["images"][0]["ranked"][0]
    assert any(good_images[0].name in line and f"{best['score']:.4f}" in line for line in lines)


def test_an_adapter_changes_the_scores(cli, good_images, tmp_path):
    pipe = tiny_pipeline("sd15")
    pipe.save_pretrained(tmp_path / "model")
    lora = save_tiny_lora("sd15", tmp_path / "lora")
    command = ["match", good_images[0], *caption_options(), *COMMON, "--model", "./model"]
    assert cli(*command, "--out", "plain").exit_code == 0
    assert cli(*command, "--out", "adapted", "--adapter", "lora", "--adapter-file", lora.name).exit_code == 0
    model = dsd.load(tmp_path / "model")
    model.load_lora(lora, "adapter")
    scores = dsd.Matcher(model, dsd.MatchConfig(timesteps=TIMESTEPS)).score(good_images[:1], CAPTIONS)[0]
    plain, adapted = (
        torch.tensor(pq.read_table(tmp_path / out / "scores.parquet")["score"].to_pylist())
        for out in ("plain", "adapted")
    )
    torch.testing.assert_close(adapted, scores, rtol=1e-5, atol=1e-5)
    assert float((plain - adapted).abs().max()) > 1e-3
    assert results(tmp_path / "adapted")["settings"]["adapter"] == "lora"


def test_every_layer(cli, good_images):
    done = cli("match", good_images[0], *caption_options(), *COMMON, "--layer", "all", "--out", "out")
    assert done.exit_code == 0, done.stderr
    found = torch.tensor(pq.read_table("out/scores.parquet")["score"].to_pylist())
    torch.testing.assert_close(found, wanted(good_images[:1], layers="all")[0], rtol=1e-5, atol=1e-5)
    assert float((found - wanted(good_images[:1])[0]).abs().max()) > 1e-3


def test_strange_names_and_captions(cli, good_images, tmp_path):
    name = os.fsdecode(b"caf\xe9 \x1b[31m[bold]\n.png")
    Path(name).write_bytes(good_images[0].read_bytes())
    captions = ["[red]a[/red] \x1b[2J circle", "クマ 🐻"]
    done = cli("match", name, "[no] such.png", *caption_options(captions), *COMMON, "--out", "out")
    assert done.exit_code == 1, done.stderr
    assert "\x1b" not in done.stdout
    assert "[bold]" in done.stdout
    assert "[red]a[/red]" in done.stdout
    content, table = results(tmp_path / "out"), pq.read_table(tmp_path / "out/scores.parquet").to_pylist()
    assert content["images"][0]["path"] == table[0]["image"] == storable(name) == "caf\\udce9 \x1b[31m[bold]\n.png"
    assert content["captions"] == captions
    assert [row["caption"] for row in table] == captions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caption", "a", "--captions", "c.txt"], "give either --captions FILE or --caption TEXT"),
        ([], "give either --captions FILE or --caption TEXT"),
        (["--caption", "a", "--caption", "caf\udce9"], "--caption number 2 ('caf\\udce9') is not UTF-8 text"),
        (["--caption", "a", "--dtype", "int8"], "dtype is 'int8', expected float32"),
        (["--caption", "a", "--device", "gpu"], "device is 'gpu'"),
        (["--caption", "a", "--model", "nobody/nothing"], "model 'nobody/nothing' is neither a folder nor"),
        (["--caption", "a", "--model", "./nothing"], "model './nothing' is a folder that does not exist"),
        (["--caption", "a", "--revision", "main"], "revision is 'main', but model 'mini' is a folder"),
        (["--caption", "a", "--timesteps", "0"], "timesteps: got 0"),
        (["--caption", "a", "--runtime", "jit"], "runtime: got 'jit', expected 'inductor' or 'cudagraph'"),
        (["--caption", "a", "--runtime", "cudagraph"], "runtime: 'cudagraph' needs a network on a CUDA device"),
        (["--caption", "a", "--timesteps", "many"], "--timesteps: 'many' is neither a count nor"),
        (["--caption", "a", "--timesteps", "5,1000"], "timesteps holds 1000, expected 0 to 999"),
        (["--caption", "a", "--memory-budget", "lots"], "--memory-budget: 'lots' is no size"),
        (["--caption", "a", "--memory-budget", "1kB"], "memory_budget: 1,000 bytes cannot hold"),
        (["--caption", "a", "--pool", "min"], "--pool: 'min' is neither mean, max nor a temperature"),
        (["--caption", "a", "--tokens", "some"], "tokens: got 'some'"),
        (["--caption", "a", "--official", "--draws", "2"], "official: the official score has draws=1"),
        (["--caption", "a", "--layer", "all", "--layer", "mid"], "--layer: all is every cross-attention, expected it"),
        (["--caption", "a", "--layer", "all", "--official"], "official: the official score has layers='official'"),
        (["--caption", "a", "--layer", "mid"], "unknown id 'mid'; the nearest"),
        (["--caption", "a", "--image-size", "63"], "image_size: got (63, 63), expected multiples of 4"),
        (["--caption", "a", "--adapter", "none.safetensors"], "LoRA 'none.safetensors' does not exist"),
        (["--caption", "a", "--caption", "word " * 40], "caption 2 ('word word"),
        (["--caption", "a", "--out", "a-file"], "--out a-file cannot be written: it is a file"),
        (["--caption", "a", "--out", "a-file/deep"], "--out a-file/deep cannot be written: Not a directory"),
        (["--caption", "a", "--out", "taken"], "--out taken cannot be written: Is a directory"),
        (["--caption", "a", "--out", "/proc/nothing"], "--out /proc/nothing cannot be written"),
        (["--caption", "a", "--top-k", "0"], "Invalid value for '--top-k'"),
        (["--caption", "a", "--heatmaps", "6"], "--heatmaps: got 6, expected at most --top-k, 5"),
        (["--caption", "a", "--heatmaps", "-1"], "Invalid value for '--heatmaps'"),
    ],
)
def test_usage_errors_are_one_sentence(cli, good_images, tmp_path, arguments, message):
    Path("a-file").write_text("not a folder")
    Path("taken/results.json").mkdir(parents=True)
    done = cli("match", good_images[0], "--out", "out", *COMMON, *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert isinstance(done.exception, SystemExit)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".parquet", ".tmp")]
    assert [path.is_dir() for path in tmp_path.rglob("results.json")] == [True]


def test_a_failed_run_leaves_the_results_before_it(cli, good_images, tmp_path):
    command = ["match", good_images[0], *COMMON, "--out", "out", "--caption"]
    assert cli(*command, "a").exit_code == 0
    before = files(Path("out"))
    assert cli(*command, "word " * 40).exit_code == 2
    assert files(Path("out")) == before


def test_a_score_that_is_no_number_is_an_error_row(cli, good_images, tmp_path, monkeypatch):
    def scores(self, images, texts, together):
        for number, _ in enumerate(images):
            yield number, torch.tensor([0.5 if number else float("nan"), 1.0])

    monkeypatch.setattr(dsd.Matcher, "_scores", scores)
    done = cli("match", *good_images[:2], *caption_options(["a", "b"]), "--out", "out")
    assert done.exit_code == 1
    first, second = results(tmp_path / "out")["images"]
    assert first["error"]["reason"] == "not-finite"
    assert [row["caption"] for row in second["ranked"]] == ["b", "a"]
    assert len(pq.read_table("out/scores.parquet")) == 2


def test_a_run_that_fails_while_it_scores_leaves_nothing_open(cli, good_images, monkeypatch):
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    done = cli("match", good_images[0], "--caption", "a", "--out", "out", "--memory-budget", "1kB")
    assert done.exit_code == 2
    assert not Path("out").exists()
    del done
    gc.collect()
    assert complaints == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_is_one_sentence(cli, good_images, monkeypatch, error):
    def scores(self, images, texts, together):
        raise error
        yield

    monkeypatch.setattr(dsd.Matcher, "_scores", scores)
    done = cli("match", good_images[0], "--caption", "a", "--out", "out")
    assert done.exit_code == 2
    assert "out of memory; give a smaller --memory-budget" in done.stderr
    assert shown("out") == ["manifest.json"]


def test_scores_are_written_as_they_come(cli, good_images, monkeypatch):
    """Row groups leave memory while the run goes on: what is held does not grow with the number of images."""

    monkeypatch.setattr(dsd.Matcher, "_scores", zeros)
    monkeypatch.setattr("dsd_fast.cli.results._GROUP_ROWS", 40)
    done = cli("match", *[good_images[0]] * 60, *caption_options(), "--out", "out")
    assert done.exit_code == 0, done.stderr
    metadata = pq.read_metadata("out/scores.parquet")
    assert metadata.num_rows == 60 * len(CAPTIONS)
    assert metadata.num_row_groups == 6
    assert "and 40 more images in results.json" in done.stdout
