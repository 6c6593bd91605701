"""A fitted matcher in a folder: it scores the same when it is loaded, and stock diffusers reads its LoRA."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.jobs import write_tensors
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.files import LORA, MATCHER, PROMPT
from dsd_fast.reference import matching as reference
from tests.matching.fitting.parts import TEXTS, TIMES, groups, matcher, pictures, pipeline

FIT = FitConfig(steps=2, batch_size=2, learning_rate=5e-2, warmup=0)


def fitted(methods, folder=None, pipe=None, config=FIT, **settings):
    own = matcher(pipe or pipeline(), **settings)
    own.fit(groups(), methods, config=config, out=folder, progress=False)
    return own


@pytest.fixture(scope="module")
def everything():
    return fitted(("lora", "prompt", "heads"))


@pytest.mark.parametrize(
    ("methods", "files"),
    [
        ("lora", [LORA]),
        ("prompt", [PROMPT]),
        ("heads", []),
        (("lora", "prompt", "heads"), [LORA, PROMPT]),
    ],
    ids=str,
)
def test_a_loaded_matcher_scores_the_same(tmp_path, methods, files):
    settings = {"timesteps": range(200, 800, 200), "noise_weight": float(np.float32(0.3)), "tokens": "real"}
    own = fitted(methods, tmp_path / "fit", **settings)
    own.save(tmp_path / "save")
    want = own.score(pictures(2), TEXTS)
    assert {file.name for file in (tmp_path / "save").iterdir()} == {MATCHER, ".lock", *files}
    for name in ("fit", "save") if len(files) == 2 else ("save",):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = dsd.Matcher.load(tmp_path / name, matcher(pipeline()).model)
        assert torch.equal(loaded.score(pictures(2), TEXTS), want)
        assert loaded.timesteps == own.timesteps
    # What was loaded can be saved, and fitted further.
    loaded.save(tmp_path / "again")
    for name in {MATCHER, *files} - {LORA}:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "save" / name).read_bytes()
    if len(files) == 2:
        loaded.fit(groups()[:1], methods, config=FIT, progress=False)
        assert not torch.equal(loaded.score(pictures(2), TEXTS), want)


def test_an_unfitted_matcher_is_its_configuration(tmp_path):
    own = matcher(pipeline(), layers={"mid-vit-block0-cross": (0.1, 0.2, 0.3, 0.4)}, image_size=(32, 16))
    own.save(tmp_path)
    loaded = dsd.Matcher.load(tmp_path, own.model)
    assert loaded.config.image_size == (32, 16)
    assert torch.equal(loaded.score(pictures(1), TEXTS), own.score(pictures(1), TEXTS))


def test_the_memory_budget_is_of_who_loads_it(tmp_path):
    own = matcher(pipeline(), memory_budget=64 << 20)
    own.save(tmp_path)
    assert "memory_budget" not in json.loads((tmp_path / MATCHER).read_text())["config"]
    assert dsd.Matcher.load(tmp_path, own.model).config.memory_budget is None
    assert dsd.Matcher.load(tmp_path, own.model, memory_budget=32 << 20).config.memory_budget == 32 << 20
    with pytest.raises(ValueError, match="memory_budget: got -1"):
        dsd.Matcher.load(tmp_path, own.model, memory_budget=-1)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.newest
def test_stock_diffusers_reads_the_lora(tmp_path, family):
    own = fitted("lora", tmp_path, pipeline(family), official=True, seed=3)
    images, texts = pictures(1), TEXTS[:2]
    got = own.score(images, texts)
    pipe = pipeline(family)
    plain = reference.score(pipe, images, texts, timesteps=TIMES, seed=3)
    pipe.load_lora_weights(tmp_path, weight_name=LORA)
    want = reference.score(pipe, images, texts, timesteps=TIMES, seed=3)
    # As far as the reference may be from us without a LoRA, and much less than the LoRA changes.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert float((want - plain).abs().max()) > 1e-2


def test_a_second_save_leaves_nothing_of_the_first(tmp_path, everything):
    everything.save(tmp_path)
    (tmp_path / f".{LORA}.0123abcd.tmp").write_bytes(b"of a killed writer")
    plain = matcher(pipeline())
    plain.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {MATCHER, ".lock"}
    loaded = dsd.Matcher.load(tmp_path, plain.model)
    assert torch.equal(loaded.score(pictures(1), TEXTS), plain.score(pictures(1), TEXTS))


def test_a_save_that_fails_leaves_no_matcher(tmp_path, everything, monkeypatch):
    """A folder with the files of two matchers must not pass for one."""
    everything.save(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsd_fast.matching.fitting.files.write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        everything.save(tmp_path)
    with pytest.raises(ValueError, match=f"has no {MATCHER}"):
        dsd.Matcher.load(tmp_path, everything.model)


def edited(folder, **changes):
    file = folder / MATCHER
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_bad_folders_are_refused_by_name(tmp_path, everything):
    model = matcher(pipeline()).model

    def refused(message, change, model=model):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        everything.save(folder)
        change(folder)
        with pytest.raises(ValueError, match=message):
            dsd.Matcher.load(folder, model)

    refused(f"has no {MATCHER}", lambda folder: (folder / MATCHER).unlink())
    refused("is no JSON", lambda folder: (folder / MATCHER).write_text("{"))
    refused("is no JSON", lambda folder: (folder / MATCHER).write_bytes(b"\xff\xfe\x00"))
    refused("of another format", lambda folder: (folder / MATCHER).write_text("[]"))
    refused("of another format", lambda folder: (folder / MATCHER).write_text('{"format": 1}'))
    refused("of another format", lambda folder: edited(folder, format=2))
    refused("unknown settings: colour", lambda folder: edited(folder, config={"colour": 1}))
    refused("attention_weight", lambda folder: edited(folder, config={"attention_weight": float("nan")}))
    refused(f"{LORA} is missing", lambda folder: (folder / LORA).unlink())
    refused(f"{LORA} is no safetensors", lambda folder: (folder / LORA).write_bytes(b"\x80\x04."))
    refused(r"shape \(4, 25\), expected \(n, 24\)", lambda folder: prompt(folder, torch.zeros(4, 25)))
    refused(r"shape \(24,\), expected \(n, 24\)", lambda folder: prompt(folder, torch.zeros(24)))
    refused(r"prompt.*expected \(n, 24\)", lambda folder: write_tensors(folder / PROMPT, {}))
    refused("no adapter 'x'", lambda folder: edited(folder, adapter="x"))
    refused("of family sd1, got sdxl", lambda folder: None, matcher(pipeline("sdxl")).model)
    with pytest.raises(ValueError, match=f"has no {MATCHER}"):
        dsd.Matcher.load(tmp_path / "nothing", model)


def prompt(folder, values):
    write_tensors(folder / PROMPT, {"prompt": values})


def test_a_lora_that_does_not_fit_is_refused(tmp_path, everything):
    everything.save(tmp_path)
    fitted("lora", tmp_path / "sd21", pipeline("sd21"))
    (tmp_path / LORA).write_bytes((tmp_path / "sd21" / LORA).read_bytes())
    message = r"'.*lora_A\.weight' has shape \(.*\), expected \(.*\) for '.*' of the unet"
    with pytest.raises(dsd.models.ModelError, match=message):
        dsd.Matcher.load(tmp_path, matcher(pipeline()).model)


def test_another_model_of_the_family_is_taken_with_a_warning(tmp_path, everything):
    everything.save(tmp_path)
    model = matcher(pipeline()).model
    model.name, model.revision = "elsewhere/other", "abc"
    with pytest.warns(UserWarning, match=r"was fitted to another model: name '.*', now 'elsewhere/other'; rev") as seen:
        loaded = dsd.Matcher.load(tmp_path, model)
    assert [Path(warning.filename).name for warning in seen] == ["test_files.py"]
    assert torch.equal(loaded.score(pictures(1), TEXTS), everything.score(pictures(1), TEXTS))


def test_what_is_saved_is_small_and_says_what_it_is(tmp_path, everything):
    everything.save(tmp_path)
    about = json.loads((tmp_path / MATCHER).read_text())
    assert (about["lora"], about["prompt"], about["adapter"]) == (True, True, None)
    assert about["model"]["family"] == "sd1"
    assert about["config"]["timesteps"] == TIMES
    assert about["config"]["layers"].keys() == everything.layers.keys()
