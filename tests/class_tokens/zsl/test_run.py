"""A whole run on the mini model: its figures again from its files, and killed in each stage to the same files."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import dsd_fast as dsd
from dsd_fast.class_tokens.zsl import run_zsl
from dsd_fast.class_tokens.zsl.classifiers import probabilities
from dsd_fast.class_tokens.zsl.run import read_data
from dsd_fast.class_tokens.zsl.task import crossed
from dsd_fast.engine import LearnedTokens
from dsd_fast.generation.units import try_seed
from dsd_fast.jobs import read_index, read_tensors
from dsd_fast.metrics import best_penalty, zero_shot
from tests.class_tokens.zsl.scenes import CLASSES, IMAGES, UNSEEN, config, draw
from tests.jobs.numbers import ended, files, start


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    draw(folder)
    return folder


@pytest.fixture(scope="module")
def whole(model, root, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, run_zsl(config(root, out), model=model)


def test_figures_are_those_of_its_files(root, whole):
    out, results = whole
    assert results == json.loads((out / "results.json").read_bytes())
    data = read_data(config(root, out))
    assert (data.names, tuple(data.unseen_names)) == (CLASSES, UNSEEN)
    real, _ = (each for each in read_tensors(out / "features/real/00000.safetensors"))
    real = real["features"].numpy()
    rows = {(row["method"], row["classifier"]): row for row in results["table"]}
    assert set(rows) == {(m, c) for m in ("token", "plain", "ensemble", "real") for c in ("softmax", "gaussian")} | {
        ("clip", "zero-shot")
    }
    gamma = results["choice"]["gamma"]
    assert gamma == max(results["choice"]["tried"], key=lambda each: each["h"])["gamma"]
    for method, folder in (("token", f"images-token-{gamma:g}"), ("plain", "images-plain")):
        made = read_tensors(out / f"features/test-{folder}/00000.safetensors")[0]["features"].numpy()
        index = {row["id"]: row["label"] for row in read_index(out / "test" / folder, ["label"]).to_pylist()}
        assert sorted(index.values()) == sorted(UNSEEN * 2)
        # The k-th image of each class before any class's next one.
        labels = np.array([CLASSES.index(name) for name in UNSEEN] * 2)
        scores = probabilities(
            "softmax",
            np.concatenate([real[data.train], made]),
            np.concatenate([data.labels[data.train], labels]),
            len(CLASSES),
            real[~data.train],
        )
        row = rows[method, "softmax"]
        truth = data.labels[~data.train]
        found = zero_shot(scores, truth, data.seen, row["penalty"])
        assert [row[name] for name in ("t1", "u", "s", "h")] == [found.t1, found.u, found.s, found.h]
        assert row["test_tuned"]["penalty"] == best_penalty(scores, truth, data.seen)
        assert row["test_tuned"]["h"] >= row["h"]
        for name, (low, high) in row["intervals"].items():
            assert 0 <= low <= row[name] <= high <= 1
    assert [each["images"] for each in results["sensitivity"]["images"]] == [1, 2]
    assert results["sensitivity"]["images"][-1]["h"] == rows["token", "softmax"]["h"]
    curve = {each["penalty"]: each for each in results["sensitivity"]["penalty"]}
    assert (min(curve), max(curve)) == (0, 1)
    assert results["errors"] == []
    assert results["data"]["test_images_learned_from"] == []
    assert {name: each["images"] for name, each in results["tokens"].items()} == dict.fromkeys(UNSEEN, 2)


def test_real_images_of_unseen_classes_are_judged_by_what_has_not_learned_from_them():
    first, unseen = np.array([True, False, True, False]), np.array([True, True, False, False])

    def learned(half):
        # Of each image whether it was learned from, and which half it was.
        return {"real": np.stack([half, np.full(4, half[0])], 1).astype(float)}

    found = crossed(learned, first, unseen)["real"]
    assert found[:, 0].tolist() == [0, 0, 0, 0]
    assert found[:, 1].tolist() == [0, 1, 0.5, 0.5]


def test_tokens_and_plain_images_have_the_same_noise_and_other_texts(whole):
    out, results = whole
    gamma = results["choice"]["gamma"]
    told = {}
    for folder in (f"images-token-{gamma:g}", "images-plain"):
        rows = read_index(out / "test" / folder, ["label", "seed", "prompt"]).to_pylist()
        told[folder] = {(row["label"], row["seed"]): row["prompt"] for row in rows}
    token, plain = told.values()
    assert token.keys() == plain.keys()
    assert plain[next(key for key in plain if key[0] == "red circle")] == "A photo of red circle"
    assert token[next(key for key in token if key[0] == "red circle")] == "A photo of <red-circle> red circle"
    tokens = LearnedTokens.load(out / f"test/tokens-{gamma:g}")
    assert list(tokens.classes.values()) == list(UNSEEN) == list(results["tokens"])


def test_sheets_end_in_the_images_of_both_texts(whole):
    out, results = whole
    gamma = results["choice"]["gamma"]
    assert [sheet["class"] for sheet in results["sheets"]] == list(UNSEEN)
    for sheet in results["sheets"]:
        # One step, and the image.
        assert len(sheet["times"]) == 2
        assert sheet["times"][1] == -1
        drawn = np.array(Image.open(out / sheet["file"]))
        height, width = (side // 2 for side in drawn.shape[:2])
        for line, folder in enumerate(("images-plain", f"images-token-{gamma:g}")):
            rows = read_index(out / "test" / folder, ["id", "label", "seed"]).to_pylist()
            # The first of the class, in the order that images are made in.
            row = next(row for row in rows if row["label"] == sheet["class"] and row["seed"] == first_seed(sheet))
            made = np.array(Image.open(next((out / "test" / folder).rglob(f"{row['id']}.png"))))
            shown = drawn[line * height : (line + 1) * height, width:]
            # Of other rows computed together: rounding.
            assert np.abs(shown.astype(int) - made).max() <= 1
        assert (drawn[:height] != drawn[height:]).any()


def first_seed(sheet):
    return try_seed(0, sheet["class"], 0, 0)


def test_killed_in_each_stage_and_the_same_files(model, root, whole, tmp_path, monkeypatch):
    out = tmp_path / "killed"
    # A kill, unlike a power failure, takes nothing back that was written.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def run(moment):
        def report(stage, done, total):
            if moment and stage.startswith(moment[0]) and done >= moment[1]:
                os.kill(os.getpid(), signal.SIGKILL)

        rename = os.replace

        def replaced(source, target):
            if moment and moment[0] == os.path.basename(target):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = replaced
        run_zsl(config(root, out), model=model, report=report)

    moments = [
        ("features: real", IMAGES),
        ("cdm.safetensors", 0),
        ("validation: tokens, γ = 0.1", 1),
        ("bank.safetensors", 0),
        ("validation: images, images-token-1", 1),
        ("test: tokens", 1),
        ("test: images, images-plain", 4),
        ("test: steps", 1),
        ("results.json", 0),
    ]
    assert [ended(start(lambda moment=moment: run(moment))) for moment in [*moments, None]] == [
        *[signal.SIGKILL] * len(moments),
        0,
    ]
    killed, expected = (
        {name: content for name, content in files(folder).items() if "/.lock" not in name and "timeline" not in name}
        for folder in (out, whole[0])
    )
    # Where the run was.
    killed["results.json"] = killed["results.json"].replace(str(out).encode(), str(whole[0]).encode())
    assert killed.keys() == expected.keys()
    assert [name for name in killed if killed[name] != expected[name]] == []


def test_other_settings_take_what_does_not_depend_on_them_and_are_refused_else(model, root, whole, tmp_path):
    out, _ = whole
    settings = config(root, out)
    before = files(out / "test" / "images-plain")
    stages = []
    fewer = replace(settings, baselines=("plain",), classifiers=("gaussian",), per_class=1, counts=(1,))
    results = run_zsl(fewer, model=model, report=lambda stage, done, total: stages.append(stage))
    assert [(row["method"], row["classifier"]) for row in results["table"]] == [
        ("token", "gaussian"),
        ("plain", "gaussian"),
    ]
    assert not {name for name, content in files(out / "test/images-plain").items() if content != before.get(name)} - {
        "timeline.json"
    }
    assert not any("ensemble" in stage or "clip" in stage for stage in stages)
    with pytest.raises(ValueError, match="learning_rate"):
        run_zsl(replace(settings, tokens=replace(settings.tokens, learning_rate=0.01)), model=model)


def test_an_image_that_cannot_be_used_is_told_and_counts_in_nothing(model, tmp_path):
    root = tmp_path / "images"
    draw(root)
    (root / "purple_ring" / "extra.png").write_bytes(b"no image")
    settings = config(root, tmp_path / "out", validation=0, gammas=None, baselines=(), counts=(1,))
    settings = replace(settings, accept=0.0, max_tries=1, per_class=6)
    settings = replace(settings, classifiers=("softmax",), tokens=replace(settings.tokens, updates=1))
    results = run_zsl(settings, model=model)
    (error,) = results["errors"]
    assert "extra.png" in error
    data = results["data"]
    assert data["train_images"] + data["test_images_of_seen"] + data["test_images_of_unseen"] == len(CLASSES) * IMAGES
    assert (results["table"][0]["penalty"], data["validation"]) == (0, [])
    # Images that were not accepted are none.
    made = read_index(tmp_path / "out/test/images-token-0.9", ["status"])["status"].to_pylist()
    assert set(made) == {"ok", "error"}
    features, _ = read_tensors(tmp_path / "out/features/test-images-token-0.9/00000.safetensors")
    assert len(features["features"]) == made.count("ok")
    # What is refused before anything is computed.
    Image.new("RGB", (8, 8)).save(root / "purple_ring" / "extra.png")
    with pytest.raises(ValueError, match="no folder 'unicorn'"):
        run_zsl(replace(settings, unseen=("unicorn", "red_circle")), model=model)
