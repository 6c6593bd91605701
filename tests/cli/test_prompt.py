"""`dsd-fast prompt`: what the library does, into a folder; what is shown of it, and what makes images with it."""

import json
from contextlib import contextmanager
from dataclasses import fields, replace
from inspect import Parameter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from dsd_fast.cli.options import AdaptedModelOptions, ModelOptions
from dsd_fast.cli.prompt import tune
from dsd_fast.cli.prompt.options import ConvertRequest, CustomizeRequest, EditRequest, FinetuneRequest
from dsd_fast.cli.prompt.report import made_by
from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.generation import GenerateConfig
from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter, TuneConfig
from dsd_fast.jobs import read_index
from dsd_fast.models.mini.scenes import scene
from tests.cli.test_report import Seen

HOSTILE = "<b>[ring]'&\""
FEW = ["--sampling-steps", 2, "--guidance", 2, "--scheduler", "ddim"]
SAMPLED = GenerateConfig(steps=2, guidance=2.0, scheduler="ddim")


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(autouse=True)
def loaded(model, monkeypatch):
    """The mini model as it is, loaded once for all commands."""
    for options in (ModelOptions, AdaptedModelOptions):
        monkeypatch.setattr(options, "load", lambda self: model)


@pytest.fixture(autouse=True)
def photos(cli):
    """Three pictures and a file that is none."""
    Path("photos").mkdir()
    for name, seed in (("a", 1), (HOSTILE, 2), ("c", 3)):
        Image.fromarray(scene(seed).image).save(f"photos/{name}.png")
    Path("photos/bad.png").write_bytes(b"dear diary")


def requested(kind, **values):
    """A request with the defaults of its options but for some."""
    parameters = list(kind.parameters())
    defaults = {p.name: None if p.default is Parameter.empty else p.default for p in parameters}
    assert set(values) <= set(defaults)
    return kind.of(defaults | values)


def usable():
    return [path for path in sorted(Path("photos").iterdir()) if path.name != "bad.png"]


def tile(sheet, row, column):
    """A picture of the mini model on a sheet, in its own pixels."""
    return np.asarray(sheet).astype(int)[::4, ::4][row * 65 : row * 65 + 64, column * 65 : column * 65 + 64]


def test_its_options_are_the_settings_with_their_defaults():
    request = requested(ConvertRequest)
    assert request.converter.config(request.source) == ImagePromptConfig()
    names = {parameter.name for parameter in ConvertRequest.parameters()}
    assert {field.name for field in fields(ImagePromptConfig)} <= names
    assert request.alpha == 0
    assert requested(EditRequest).alpha == 0.6
    assert requested(FinetuneRequest).tuning.tuning() == TuneConfig()
    assert requested(CustomizeRequest).tuning.tuning() == TuneConfig.few()
    assert requested(FinetuneRequest, attention="none").tuning.tuning().attention is None
    names = {parameter.name for parameter in FinetuneRequest.parameters()}
    assert {field.name for field in fields(TuneConfig)} <= names


@pytest.mark.newest
def test_it_converts_as_the_library_does_and_shows_it(cli, model):
    options = ["--inverse", "ridge", "--cut", 0.5, "--norm", 9, "--prompt", "a small"]
    done = cli(
        "prompt", "convert", "photos", *options, "--out", "out", "--pictures", 2, "--variations", 2, "--report", *FEW
    )
    assert done.exit_code == 1, done.stderr
    assert "4 images: 3 converted now, 0 before, 1 error" in done.stdout
    assert "unsupported-format" in done.stdout
    assert "Vectors of norm 9, by the ridge inverse at 0.5." in done.stdout
    converter = ImagePromptConverter(model, config=ImagePromptConfig(inverse="ridge", cut=0.5, norm=9.0))
    want = converter.convert(usable(), "a small")
    got = ImagePrompt.load("out")
    # Rows of a batch may round otherwise where one of them is missing.
    assert torch.allclose(got.embeds, want.embeds, rtol=0, atol=1e-4)
    assert got.names == want.names == (HOSTILE, "a", "c")
    assert got.alpha == 0

    rows = [dsd.GenerateRow(prompt, seed) for prompt in got[:2] for seed in range(2)]
    pictures = list(dsd.generate(model, rows, SAMPLED))
    for number, path in enumerate(usable()[:2]):
        with Image.open(f"out/pictures/{number:05d}.png") as sheet:
            assert sheet.size == (3 * 256 + 8, 256)
            assert np.array_equal(tile(sheet, 0, 0), np.asarray(Image.open(path)).astype(int))
            for seed in range(2):
                expected = np.asarray(pictures[2 * number + seed]).astype(int)
                assert np.abs(tile(sheet, 0, 1 + seed) - expected).max() <= 1
    assert not Path("out/pictures/00002.png").exists()

    seen = Seen(Path("out/report.html").read_text(encoding="utf-8"))
    assert "b" not in {tag for tag, _ in seen.tags}
    assert all(text in seen.text for text in (HOSTILE, "a small", "bad.png", "unsupported-format", "ridge"))
    assert len([tag for tag, _ in seen.tags if tag == "img"]) == 2

    again = cli("prompt", "convert", "photos", *options, "--out", "out")
    assert "0 converted now, 3 before, 1 error" in again.stdout
    refused = cli("prompt", "convert", "photos", *options, "--out", "out", "--norm", 10)
    assert refused.exit_code == 2
    assert "norm" in refused.stderr


def test_it_edits_each_image_by_its_own_text(cli, model):
    texts = {HOSTILE: "a red ring", "a": "", "c": "a blue square"}
    rows = [{"image": name, "prompt": text} for name, text in [*texts.items(), ("bad", "a digit")]]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli("prompt", "edit", "photos", "--prompts", "texts.jsonl", "--alpha", 0.25, "--out", "out")
    assert done.exit_code == 1, done.stderr
    want = ImagePromptConverter(model).edit(usable(), list(texts.values()), 0.25)
    got = ImagePrompt.load("out")
    assert got.alpha == 0.25
    assert torch.allclose(got.embeds, want.embeds, rtol=0, atol=1e-4)
    index = {row["name"]: row["prompt"] for row in read_index("out").to_pylist()}
    assert index == texts | {"bad": "a digit"}
    assert not Path("out/pictures").exists()


TUNED = ["--steps", 2, "--batch-size", 2, "--prompt-tokens", 2, "--out", "tuned"]


@pytest.mark.newest
def test_it_tunes_as_the_library_does_and_what_it_learned_is_used(cli, model):
    Path("photos/bad.png").unlink()
    command = ["prompt", "customize", "photos", *TUNED, "--norm", 9]
    shown = ["--pictures", 1, "--variations", 1, *FEW, "--report"]
    done = cli(*command, *shown)
    assert done.exit_code == 0, done.stderr
    base = ImagePromptConverter(model, config=ImagePromptConfig(norm=9.0))
    want = base.finetune(usable(), replace(TuneConfig.few(2), batch_size=2, prompt_tokens=2), progress=False)
    got = ImagePromptConverter.load("tuned", model)
    prompts = want.convert(usable())
    assert torch.equal(got.convert(usable()).embeds, prompts.embeds)
    assert not torch.allclose(base.convert(usable()).embeds, prompts.embeds, atol=1e-2)

    history = json.loads(Path("tuned/history.json").read_text())
    (record,) = want.tuning.history.records
    assert history["records"] == [{"step": 2, "loss": record.loss, "accuracy": None, "validation_loss": None}]
    assert (history["steps"], history["images"], history["parameters"]) == (2, 3, want.tuning.parameters)
    assert f"2 steps on 3 images, loss {record.loss:.4f}, {want.tuning.parameters:,} numbers learned" in done.stdout
    with Image.open("tuned/pictures/00000.png") as sheet:
        for line, converter in enumerate((base, want)):
            rows = dsd.generate(converter.model, converter.convert(usable()[:1]), SAMPLED)
            assert np.abs(tile(sheet, line, 1) - np.asarray(next(rows)).astype(int)).max() <= 1
    seen = Seen(Path("tuned/report.html").read_text(encoding="utf-8"))
    assert all(text in seen.text for text in (HOSTILE, f"{record.loss:.4f}", "3 images"))
    assert len([tag for tag, _ in seen.tags if tag == "img"]) == 1

    # By the commands: what is learned of CLIP in the prompts, the LoRA in the model that makes images of them.
    assert cli("prompt", "convert", "photos", "--tuned", "tuned", "--out", "out").exit_code == 0
    assert torch.allclose(ImagePrompt.load("out").embeds, prompts.embeds, rtol=0, atol=1e-4)
    refused = cli("prompt", "convert", "photos", "--tuned", "tuned", "--norm", 2, "--out", "out")
    assert "--norm: given with --tuned" in refused.stderr
    adapted = dsd.load("mini")
    adapted.load_lora("tuned", "own")
    (mine,), (theirs,) = (list(dsd.generate(each, prompts[:1], SAMPLED)) for each in (want.model, adapted))
    assert np.abs(np.asarray(mine).astype(int) - np.asarray(theirs).astype(int)).max() <= 1

    again = cli(*command, "--pictures", 0)
    assert again.exit_code == 0, again.stderr
    assert json.loads(Path("tuned/history.json").read_text())["records"] == history["records"]
    refused = cli(*command, "--rank", 4)
    assert refused.exit_code == 2
    assert "rank" in refused.stderr


def test_a_stopped_tuning_keeps_its_checkpoint(cli, monkeypatch):
    Path("photos/bad.png").unlink()

    def stop(step, loss, record):
        raise KeyboardInterrupt

    @contextmanager
    def stopping(name, steps):
        yield stop

    monkeypatch.setattr(tune, "showing_steps", stopping)
    stopped = cli("prompt", "customize", "photos", *TUNED)
    assert stopped.exit_code == 130
    assert "interrupted; the same command goes on from what is in tuned" in stopped.stderr


def test_a_loss_that_is_no_number_is_one_sentence(cli):
    Path("photos/bad.png").unlink()
    done = cli("prompt", "customize", "photos", *TUNED, "--learning-rate", 1e30)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith("Error: step ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "nothing"], "nothing has no image"),
        (["convert", "photos", "--inverse", "best"], "inverse: got 'best', expected one of truncated, ridge, prior"),
        (["convert", "photos", "--cut", "-1"], "cut: got -1.0, expected a number of at least 0"),
        (["convert", "photos", "--norm", "0"], "norm: got 0.0, expected a number above 0"),
        (["convert", "photos", "--captions", "none"], "captions: got 'none'"),
        (["convert", "photos", "--captions", "none.txt"], "--captions none.txt cannot be read"),
        (["convert", "photos", "--prompt", "a", "--prompts", "b.csv"], "give either --prompt TEXT or --prompts FILE"),
        (["convert", "photos", "--prompts", "texts.csv"], "--prompts: none for photos/"),
        (["convert", "photos", "--guidance", "2"], "--guidance: given without --pictures"),
        (["convert", "photos", "--pictures", "1", "--sampling-steps", "0"], "steps: got 0"),
        (["convert", "photos", "--clip", "./none"], "clip './none' is a folder that does not exist"),
        (["convert", "photos", "--tuned", "none"], "none has no prompt.json"),
        (["convert", "photos", "--worker", "2"], "--worker: got 2, expected below --workers"),
        (["convert", "photos", "--out", "texts.csv"], "--out texts.csv cannot be written: it is a file"),
        (["finetune", "nothing"], "nothing has no image"),
        (["finetune", "photos", "--attention", "some"], "attention: got 'some', expected 'lora', 'full' or None"),
        (["finetune", "photos", "--timestep-range", "5"], "--timestep-range: '5' is no range"),
        (["finetune", "photos", "--validation", "nothing"], "nothing has no image"),
        (["customize", "photos", "--steps", "0"], "steps: got 0, expected an integer of at least 1"),
        (["customize", "photos", "--pictures", "0", "--variations", "2"], "--variations: given without --pictures"),
        (["customize", "photos", "--out", "texts.csv"], "--out texts.csv cannot be written: it is a file"),
        (["edit", "photos"], "give --prompt TEXT, or --prompts FILE"),
        (["edit", "photos", "--prompt", "a", "--alpha", "nan"], "alpha: got nan"),
    ],
)
def test_the_options_own_error_comes_first(cli, arguments, message):
    Path("texts.csv").write_text("image,prompt\nother,a ring\n")
    Path("nothing").mkdir()
    done = cli("prompt", arguments[0], "--out", "out", *arguments[1:])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "loading" not in done.stderr
    assert not Path("out").exists()


def test_how_good_a_fitted_map_is_is_said():
    told = made_by({"quality": {"r2": 0.75, "cosine": 0.5, "pooled_r2": 0.25}})
    assert told.endswith("on captions that were held out it has R² 0.750, cosine 0.500, pooled R² 0.250.")
