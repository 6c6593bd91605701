"""`dsd-fast generate`: rows from every place, images and error rows, what the terminal and the page say, and --row."""

import io
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dsd_fast as dsd
from dsd_fast.cli.generate.report import render
from dsd_fast.cli.options import AdaptedModelOptions
from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler, to_uint8
from dsd_fast.generation.files import read_images
from dsd_fast.jobs import Timeline, read_index, read_manifest
from tests.cli.browser import BROWSER, Page
from tests.cli.test_report_in_browser import PROBE
from tests.engine.test_image_prompts import image_prompts

COMMON = ["--steps", 1, "--guidance", 1, "--out", "out"]
HOSTILE = "<b>'&\" ring"


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(autouse=True)
def loaded(model, monkeypatch):
    """The mini model as it is, loaded once for all commands."""
    load = AdaptedModelOptions.load
    monkeypatch.setattr(AdaptedModelOptions, "load", lambda self: load(self) if self.adapter else model)


def rows(out="out"):
    return read_index(out).to_pylist()


def picture(row, out="out"):
    with Image.open(io.BytesIO(next(read_images(out, [row["id"]]))[0])) as image:
        return np.asarray(image).astype(int)


def test_images_as_prompts_of_a_file_or_folder(cli, model):
    prompts = image_prompts(model, 2, texts=[""])
    prompts.save("p.safetensors")
    prompts[1].save("n.safetensors")
    prompts[:0].save("empty.safetensors")
    done = cli("generate", "--image-prompts", "p.safetensors", "--seeds", "3,4", *COMMON)
    assert done.exit_code == 0, done.stderr
    assert [(row["name"], row["seed"]) for row in rows()] == [
        ("image 0", 3), ("image 0", 4), ("image 1", 3), ("image 1", 4),
    ]  # fmt: skip
    sampler = Sampler(model, GenerateConfig(steps=1, guidance=1.0))
    expected = to_uint8(sampler.pixels([sampler.resolve(GenerateRow(prompts[1], 4))]))[0].numpy()
    assert np.abs(picture(rows()[3]) - expected).max() <= 1
    again = cli("generate", "--out", "out", "--row", rows()[3]["id"])
    assert again.exit_code == 0, again.stderr
    assert "made again, it is the same" in again.stdout
    done = cli(
        "generate", "a dog", "--negative-image-prompt", "n.safetensors", *COMMON[:-1], "other", "--guidance", 3,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert rows("other")[0]["negative_image_prompt"] == '["../n.safetensors", 0]'
    for given, wrong in (
        (["--image-prompts", "none"], "--image-prompts: image prompts 'none' do not exist"),
        (["--image-prompts", "empty.safetensors"], "--image-prompts: empty.safetensors has no image prompts"),
        (["--image-prompts", "out"], "holds results of generation, expected image prompts"),
        (["--image-prompts", "p.safetensors", "--accept", "clip", "--threshold", 0.1], "--accept clip: given with"),
        (["--image-prompts", "p.safetensors", "a dog"], "got PROMPT and --image-prompts, expected PROMPT, --prompts,"),
        (["a dog", "--negative-image-prompt", "p.safetensors"], "--negative-image-prompt: got 2 images as prompts"),
        (["a dog", "--negative-image-prompt", "n.safetensors", "--negative-prompt", "b"], "expected one of them"),
    ):
        refused = cli("generate", *given, *COMMON[:-1], "refused")
        assert refused.exit_code == 2
        assert wrong in " ".join(refused.stderr.split())
        assert not Path("refused").exists()


@pytest.mark.newest
def test_prompts_and_seeds_of_the_command_line(cli, model):
    done = cli("generate", "a red circle", "a blue ring", "--seeds", "0:2", *COMMON, "--shard-rows", 3)
    assert done.exit_code == 0, done.stderr
    assert [(row["prompt"], row["seed"]) for row in rows()] == [
        ("a red circle", 0), ("a red circle", 1), ("a blue ring", 0), ("a blue ring", 1),
    ]  # fmt: skip
    sampler = Sampler(model, GenerateConfig(steps=1, guidance=1.0))
    expected = to_uint8(sampler.pixels([sampler.resolve(GenerateRow("a blue ring", 1))]))[0].numpy()
    assert np.abs(picture(rows()[3]) - expected).max() <= 1
    assert done.stdout.startswith("4 images: 4 made now, 0 before, 0 errors. ")
    assert re.search(r"\d+% of the encoding and \d+% of the writing meanwhile\. Results: out", done.stdout)
    assert "4/4" in done.stderr
    again = cli("generate", "a blue ring", "a dog", "--seed", "18446744073709551615,1", *COMMON)
    assert again.exit_code == 0
    assert again.stdout.startswith("4 images: 3 made now, 1 before, 0 errors. ")
    refused = cli("generate", "a dog", *COMMON, "--format", "webp", "--guidance", 2)
    assert refused.exit_code == 2
    assert "config.guidance 1.0 there, 2.0 now; format" in refused.stderr
    assert 'format "png" there, "webp" now; quality not set there, 95 now' in refused.stderr.replace("null", "not set")


def test_settings_reach_the_sampler(cli, tmp_path, monkeypatch):
    Image.new("RGB", (64, 64), (200, 30, 30)).save("a.png")
    done = cli(
        "generate", "a red circle", *COMMON, "--steps", 3, "--guidance", 2.5, "--guidance-rescale", 0.25,
        "--negative-prompt", "a ring", "--scheduler", "ddim", "--eta", 0.5, "--strength", 0.7, "--image-size", "64x48",
        "--clip-skip", 1, "--noise", "diffusers", "--guidance-interval", "0.1,9", "--image", "a.png",
        "--control", "mini", "--control-scale", 0.5, "--no-canny", "--condition", "a.png", "--no-mark",
        "--adapter", "mini", "--format", "jpg", "--quality", 90, "--layout", "parquet",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    settings = read_manifest(Path("out"))["settings"]
    assert settings["config"] == {
        "steps": 3, "guidance": 2.5, "guidance_rescale": 0.25, "negative_prompt": "a ring", "strength": 0.7,
        "image_size": [64, 48], "clip_skip": 1, "scheduler": "ddim", "eta": 0.5, "noise": "diffusers",
        "guidance_interval": [0.1, 9.0], "cache_interval": 1, "cache_branch_id": 0, "adapter": None,
    }  # fmt: skip
    assert settings["controls"] == [{"condition": None, "scale": 0.5}]
    assert list(settings["adapters"]) == ["unet"]
    assert [settings[name] for name in ("format", "quality", "mark", "layout")] == ["jpg", 90, False, "parquet"]
    (row,) = rows()
    assert (row["image"], row["conditions"]) == ("../a.png", '["../a.png"]')
    assert picture(row).shape == (64, 48, 3)
    options = ["--control", "mini", "--control-scale", 0.5, "--no-canny", "--adapter", "mini"]
    # From elsewhere than where the images' paths were given.
    monkeypatch.chdir(tmp_path / "out")
    again = cli("generate", "--out", ".", "--row", row["id"], *options)
    assert again.exit_code == 0, again.stderr
    # Without what the folder was made with besides the model it is another one.
    refused = cli("generate", "--out", ".", "--row", row["id"], *options[:4])
    assert refused.exit_code == 2
    assert "controls" in refused.stderr


def test_a_table_with_rows_that_cannot_be_made_and_its_page(cli, tmp_path):
    lines = [
        {"prompt": HOSTILE, "seed": 1, "label": "odd", "cls": 3},
        {"prompt": "a red circle", "steps": 2, "label": "even", "cls": 2},
        {"prompt": "a green ring", "image": "missing.png", "steps": 2},
        {"prompt": "a green ring", "height": 61, "width": 64, "name": HOSTILE},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = cli("generate", "--prompts", "rows.jsonl", *COMMON, "--layout", "folder", "--report")
    assert done.exit_code == 1, done.stderr
    assert "4 images: 2 made now, 0 before, 2 errors. " in done.stdout
    assert [row["reason"] for row in rows()] == ["", "", "missing", "refused"]
    assert re.search(f"a green ring +│ missing +│ {rows()[2]['message']}", done.stdout)
    assert sorted(path.parent.name for path in Path("out/images").rglob("*.png")) == ["even", "odd"]
    assert cli("generate", "--prompts", "rows.jsonl", *COMMON, "--layout", "folder").exit_code == 1
    page = Path("out/report.html").read_text()
    assert "2 images by mini. No safety checker has seen them." in page
    assert "2 rows could not be made; the reasons are below." in page
    assert re.search(r"\d+% of the encoding and \d+% of the writing went on while images were computed", page)
    for name in ("compute", "encode-0", "write"):
        assert re.search(rf'<th scope="row">{name}</th><td><svg class="lane".*?<rect class="dot"', page)
    cells = [f'<td class="number">{number}</td>' for number in (2, 1, 0)]
    assert f'<tr><th scope="row">even</th>{"".join(cells)}</tr>' in page
    if BROWSER is not None:
        with Page(Path("out/report.html").resolve(), tmp_path / "profile", width=390, scheme="dark") as shown:
            seen = shown.value(PROBE)
        assert (shown.complaints, seen["overflow"], seen["wide"]) == ([], 0, [])
        assert (len(seen["images"]), min(seen["images"])) == (2, 64)
        assert (seen["scripts"], seen["handlers"]) == (0, 0)
        assert sorted(seen["alts"]) == sorted([HOSTILE, "a red circle"])
        assert HOSTILE in seen["text"]


def test_so_many_accepted_of_each_class_by_two_workers(cli):
    command = [
        "generate", "--template", "a red {}", "--class", "circle", "--class", "ring", "--per-class", 2, "--seed", 5,
        "--accept", "clip", "--threshold", 0.6, "--max-tries", 2, "--near-duplicates", 0.999,
        *COMMON, "--steps", 3, "--report", "--workers", 2, "--worker",
    ]  # fmt: skip
    done = cli(*command, 1)
    assert done.exit_code in (0, 1), done.stderr
    # The last of the workers closes the folder, and sees what both have made.
    assert not Path("out/shards.txt").exists()
    assert cli(*command, 0).exit_code == 1
    made = rows()
    assert sorted(row["label"] for row in made) == ["circle", "circle", "ring", "ring"]
    assert all((row["score"] or 0) >= 0.6 for row in made if row["status"] == "ok")
    tries = sum(len(json.loads(row["tries"] or "[]")) for row in made)
    assert tries > 0
    page = Path("out/report.html").read_text()
    assert f'<th scope="row">low-clip-score</th><td class="number">{tries}</td>' in page
    assert "2 in all, with" in page
    assert Path("out/shards.txt").read_text().startswith("00000.tar\n")
    assert "of other workers" in done.stdout


def test_a_row_made_again(cli):
    assert cli("generate", "a red circle", "--seeds", "3,4", *COMMON, "--layout", "folder").exit_code == 0
    first, second = rows()
    again = ["generate", "--out", "out", "--row"]
    done = cli(*again, second["id"])
    assert done.exit_code == 0, done.stderr
    assert f"{second['id']}: 'a red circle', seed 4" in done.stdout
    assert "made again, it is the same: levels differ by at most" in done.stdout
    file = Path(f"out/images/{second['id'][:2]}/{second['id']}.png")
    size = file.stat().st_size
    Image.new("RGB", (64, 64)).save(file)
    # Of its length, by which a shard counts as whole.
    file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    done = cli(*again, second["id"])
    assert done.exit_code == 1
    assert "it is not the same" in done.stdout
    for options, message in (
        (["0" * 32], "has no row"),
        ([first["id"], "--steps", 1, "--guidance", 3], "--row: got --steps too"),
        ([first["id"], "--seed", 3], "--row: got --seed too"),
        ([first["id"], "a dog"], "--row: got PROMPT too"),
    ):
        done = cli(*again, *options)
        assert done.exit_code == 2
        assert message in done.stderr
    assert cli("generate", "--out", "other", "--row", first["id"]).exit_code == 2


def test_ctrl_c_keeps_whole_shards_and_the_next_run_goes_on(cli, monkeypatch):
    pixels = Sampler.pixels
    calls = []

    def interrupted(self, batch):
        calls.append(len(batch))
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return pixels(self, batch)

    monkeypatch.setattr(Sampler, "pixels", interrupted)
    command = ["generate", "a red circle", "--seeds", "0:6", *COMMON, "--shard-rows", 2]
    done = cli(*command)
    assert done.exit_code == 130
    assert "6 images: 4 made now, 0 before, 0 errors, 2 not reached before the interruption" in done.stdout
    assert not Path("out/shards.txt").exists()
    done = cli(*command)
    assert done.exit_code == 0
    assert done.stdout.startswith("6 images: 2 made now, 4 before")
    assert Path("out/shards.txt").exists()


def test_the_page_counts_near_duplicates():
    folder = {"images": 3, "errors": {}, "classes": [], "rejected": {}, "near_duplicates": 2}
    content = {"folder": folder, "settings": {"model": "mini"}, "versions": {}, "errors": [], "files": []}
    page = render(content, [], Timeline(), "").decode()
    assert "2 images marked as nearly the same as another of the class." in page
