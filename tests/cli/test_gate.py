"""`dsd-fast gate`: techniques by themselves and together, what is written, and what the page shows."""

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

import dsd_fast as dsd
from dsd_fast.cli.feature_options import LatentOptions
from dsd_fast.cli.gate.run import _techniques, verdict
from dsd_fast.cli.options import ModelOptions
from dsd_fast.features.gate import gate
from dsd_fast.models.controlnet import Control, load_controlnet
from dsd_fast.models.mini.scenes import EVAL_SEED, scene

LAYER = "up-level0-repeat0-res-out"
COMMON = ["--layers", LAYER, "--timesteps", "100", "--out", "out"]
FAST = [*COMMON, "--steps", 2, "--strength", 0.5]


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture
def loaded(model, monkeypatch):
    """The mini model as it is, loaded once for several commands, which leave it so."""
    monkeypatch.setattr(ModelOptions, "load", lambda _: model)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(3):
        Image.fromarray(scene(EVAL_SEED + number).image).save(folder / f"{number}.png")
    return folder


def ranking():
    with open("out/ranking.csv") as file:
        return {row["technique"]: row for row in csv.DictReader(file)}


def test_inversion_is_a_technique_and_joins_what_adds_noise(model):
    def names(**latents):
        return [each.name for each in _techniques(model, "a picture", (), (), LatentOptions(**latents))]

    assert names(inversion=True) == ["prompt", "inversion", "prompt + inversion"]
    # A walk down from noise and a walk up exclude each other.
    both = names(inversion=True, denoise_from=60)
    assert both == ["prompt", "from t = 60", "inversion", "prompt + from t = 60"]


def test_techniques_by_themselves_and_together(cli, images):
    prompts = [scene(EVAL_SEED + number).caption for number in range(3)]
    lines = [json.dumps({"image": f"{number}.png", "prompt": prompt}) for number, prompt in enumerate(prompts)]
    Path("prompts.jsonl").write_text("\n".join(lines))
    done = cli(
        "gate", images, *FAST, "--prompts", "prompts.jsonl", "--control", "mini", "--control-scale", 0.5,
        "--adapter", "style=mini", "--denoise-from", 103, "--seed", 4, "--shown", 2,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    model = dsd.load("mini")
    model.load_lora("mini", "style")
    edges = Control(load_controlnet("mini"), scale=0.5)
    way = {"prompts": "", "adapter": ()}
    techniques = [
        dsd.Technique("prompt", prompts=prompts, adapter=()),
        dsd.Technique("control", **way, controls=[edges]),
        dsd.Technique("lora style", prompts="", adapter="style"),
        dsd.Technique("from t = 103", **way, denoise_from=103),
        dsd.Technique("all", prompts=prompts, controls=[edges], adapter="style", denoise_from=103),
    ]
    paths = [images / f"{number}.png" for number in range(3)]
    extractor = dsd.FeatureExtractor(model, [LAYER], (100,))
    rows = gate(extractor, paths, techniques, seed=4, steps=2, strength=0.5).rows()
    expected = {row["technique"]: row for row in rows}
    together = "prompt + control + lora style + from t = 103"
    expected[together] = expected.pop("all")
    found = ranking()
    assert set(found) == set(expected)
    for name, row in expected.items():
        accepted = "" if row["accepted"] is None else str(row["accepted"])
        assert (found[name]["take"], found[name]["accepted"]) == (str(row["take"]), accepted)
        for key in ("score", "score_gain", "vae_gain", "clip_gain"):
            # The same calls in the same order.
            assert float(found[name][key]) == pytest.approx(row[key], rel=1e-6, abs=1e-9)
        assert name.split(" + ")[0] in done.stdout
    best = [name for name, row in expected.items() if row["take"]]
    said = "None of the techniques is" if not best else "Worth taking"
    assert "3 images: 3 used, 0 errors, in " in done.stdout
    assert said in done.stdout
    assert {path.name for path in Path("out").iterdir()} == {
        "contact-sheet.png", "distances.parquet", "gate.json", "prompts.jsonl", "ranking.csv", "report.html",
        "scores.parquet", "scores.png",
    }  # fmt: skip
    assert [json.loads(line)["prompt"] for line in Path("out/prompts.jsonl").read_text().splitlines()] == prompts
    assert pq.read_table("out/scores.parquet").num_rows == 6 * 3
    page = Path("out/report.html").read_text()
    assert said in page
    # The input and what img2img makes of it, but for the way to make latents, which does not enter it.
    assert page.count("<img ") == 2 * (1 + 5)
    assert together in page


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([(True, None, 0.2), (False, False, 0.3)], "Worth taking: a."),
        ([(False, None, 0.2), (False, False, 0.3)], "None of the techniques is surely worth taking; more images may"),
        ([(False, True, -0.1), (False, False, 0.3)], "None of the techniques is worth taking."),
    ],
)
def test_the_verdict_says_what_is_open(rows, sentence):
    told = [
        {"technique": name, "take": take, "accepted": accepted, "score_gain_high": high}
        for name, (take, accepted, high) in zip("ab", rows, strict=True)
    ]
    assert verdict(told).startswith(sentence)


def test_what_an_earlier_run_has_left_is_replaced_and_bad_images_are_said(cli, loaded, images, bad_images):
    given = [images / "0.png", *(path for path in bad_images if path.is_file())]
    done = cli("gate", *given, *FAST, "--prompt", "a red circle")
    assert done.exit_code == 1, done.stderr
    assert f"{len(given)} images: 1 used, {len(given) - 1} errors" in done.stdout
    page = Path("out/report.html").read_text()
    assert all(str(path) in page for path in given[1:])
    measured = ["--no-guide", "--denoise-from", 101, "--normalize", "--anchor-timestep", 500]
    done = cli("gate", images / "0.png", *COMMON, *measured)
    assert done.exit_code == 0, done.stderr
    assert {path.name for path in Path("out").iterdir()} == {
        "gate.json", "ranking.csv", "report.html", "scores.parquet", "scores.png",
    }  # fmt: skip
    settings = json.loads(Path("out/gate.json").read_text())["settings"]
    assert (settings["guide"], settings["normalize"], settings["anchor"]) == (None, True, ["baseline", 500])
    assert "left out" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a technique: --prompt, --prompts, --captioner, --control, --adapter, --denoise-from or --inversion"),
        (["--prompt", "a", "--captioner", "b"], "give one of --prompt TEXT, --prompts FILE and --captioner NAME"),
        (["--captioner", "no/such"], "quality has 44 tokens, expected at most 24"),
        (["--captioner", "no/such", "--quality", ""], "captioner 'no/such'"),
        (["--adapter", "none.safetensors"], "LoRA 'none.safetensors' does not exist"),
        (["--denoise-steps", "2"], "--denoise-steps: given without --denoise-from"),
        (["--prompt", "a", "--strength", "0"], "strength is 0.0, expected above 0"),
        (["--prompt", "a", "--timesteps", "0"], "timesteps: got 0 alone, where nothing shifts"),
        (["--prompt", "a", "--out", "a-file"], "--out a-file cannot be written: it is a file"),
    ],
)
def test_usage_errors_are_one_sentence(cli, loaded, images, arguments, message):
    Path("a-file").write_text("not a folder")
    done = cli("gate", images / "0.png", *FAST, *arguments)
    assert done.exit_code == 2, done.stdout
    assert message in " ".join(done.stderr.split())
    assert not Path("out").exists()


def test_no_image_that_can_be_used_is_an_error(cli, bad_images):
    bad = next(path for path in bad_images if path.name == "empty.png")
    done = cli("gate", bad, *FAST, "--prompt", "a")
    assert done.exit_code == 2
    assert f"no image can be used; the first: {bad}" in " ".join(done.stderr.split())
