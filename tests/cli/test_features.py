"""`dsd-fast features`: every good image extracted, every bad one an error row, and what the files say."""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

import dsd_fast as dsd
from dsd_fast.cli import main
from dsd_fast.cli.options import AdaptedModelOptions
from dsd_fast.features.export import extract_to
from dsd_fast.jobs import read_index, read_manifest, read_tensors
from dsd_fast.models.lora import save_lora
from tests.jobs.numbers import ended, files, start

# Early ones, so that the network's first steps are all that runs.
LAYERS = ["down-level0-repeat0-res-out", "down-level0-downsampler-out"]
COMMON = ["--layers", ",".join(LAYERS), "--timesteps", "50,200", "--shard-rows", 4]


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(autouse=True)
def loaded(model, monkeypatch):
    """The mini model as it is, loaded once for all commands."""
    load = AdaptedModelOptions.load

    def once(self):
        return model if self.model == "mini" and not self.adapter else load(self)

    monkeypatch.setattr(AdaptedModelOptions, "load", once)


@pytest.fixture
def images(tmp_path):
    """Ten pictures in a folder, some of them in a folder of it."""
    draw = np.random.default_rng(0)
    for number in range(10):
        file = tmp_path / "in" / ("deep" if number > 6 else "") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40 + number, 64, 3), np.uint8)).save(file)
    return tmp_path / "in"


def features_of(out):
    """Name → id → tensor, from the shards."""
    rows = [row for row in read_index(out).to_pylist() if row["status"] == "ok"]
    read = {row["shard"]: read_tensors(Path(out) / "shards" / f"{row['shard']}.safetensors")[0] for row in rows}
    return {row["name"]: {name: each[row["row"]] for name, each in read[row["shard"]].items()} for row in rows}


def check(model, out, names, paths, **settings):
    """The files hold what the extractor gives.

    Batches of other sizes: convolutions agree to 1e-5 of the largest activation.
    """
    settings = {"layers": LAYERS, "timesteps": (50, 200), **settings}
    expected = dsd.FeatureExtractor(model, **settings).extract(paths)
    found = features_of(out)
    assert set(found) == set(names)
    for number, name in enumerate(names):
        assert set(found[name]) == set(expected)
        for layer, value in found[name].items():
            whole = expected[layer][number]
            assert torch.allclose(value.float(), whole.float(), rtol=0, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.newest
def test_folders_and_files_and_what_the_terminal_says(cli, model, images):
    done = cli("features", images / "deep", images / "1.png", images / "1.png", "--out", "out", *COMMON)
    assert done.exit_code == 0, done.stderr
    paths = [images / "deep" / f"{number}.png" for number in (7, 8, 9)]
    check(model, "out", ["7", "8", "9", "1"], [*paths, images / "1.png"])
    assert done.stdout.startswith("5 images: 4 done now, 0 before, 0 errors, 1 duplicate. ")
    assert "% of the writing while computing. Results: out" in done.stdout
    assert "5/5" in done.stderr
    assert sorted(path.name for path in Path("out").iterdir() if not path.name.startswith(".")) == [
        "index", "manifest.json", "shards", "timeline.json",
    ]  # fmt: skip
    again = cli("features", images, "--out", "out", *COMMON)
    assert again.exit_code == 0
    # Those of the folder below have other names now.
    assert again.stdout.startswith("10 images: 9 done now, 1 before, 0 errors. ")
    assert set(features_of("out")) > {"deep/7", "0", "1"}


def test_bad_images_among_good_ones(cli, images, bad_images):
    given = [path for path in bad_images if path.is_file() or not path.exists()]
    done = cli("features", images, *given, "--out", "out", *COMMON)
    assert done.exit_code == 1
    rows = {row["path"]: row for row in read_index("out").to_pylist()}
    assert {row["path"]: row["reason"] for row in rows.values() if row["status"] == "error"} == {
        str(path): bad_images[path] for path in given
    }
    assert len(features_of("out")) == 10
    assert f"{10 + len(given)} images: 10 done now, 0 before, {len(given)} errors. " in done.stdout
    for path in given:
        assert rows[str(path)]["message"] in done.stdout
    again = cli("features", images, *given, "--out", "out", *COMMON)
    assert again.exit_code == 1
    assert f"0 done now, 10 before, {len(given)} errors" in again.stdout


def test_an_error_is_tried_again_when_asked(cli, images):
    whole = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(whole[:100])
    command = ["features", images, "--out", "out", *COMMON]
    assert cli(*command).exit_code == 1
    # It cannot be told from before by its content alone.
    assert cli(*command, "--retry-errors").exit_code == 1
    (images / "3.png").write_bytes(whole)
    done = cli(*command)
    assert done.exit_code == 0
    assert "1 done now, 9 before, 0 errors" in done.stdout


def test_settings_reach_the_extractor(cli, images, tmp_path):
    layer = "up-level1-repeat0-vit-block0-cross-q"
    paths = [images / "1.png", images / "2.png"]
    lines = [{"image": "1.png", "prompt": "a red circle"}, {"image": "2", "prompt": "a photo of the digit three"}]
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("layers.json").write_text(json.dumps({layer: True, LAYERS[0]: False, f"{layer[:-1]}k": True}))
    model, lora = dsd.load("mini"), tmp_path / "lora.safetensors"
    with torch.random.fork_rng():
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        model.unet.add_adapter(config, "adapter")
    save_lora(model.unet, "adapter", lora)
    done = cli(
        "features", *paths, "--out", "out", "--layers", "layers.json", "--timesteps", "0,100",
        "--prompts", "prompts.jsonl", "--attention", "up_cross,down_self",
        "--adapter", lora, "--draws", 2, "--resize", "4x4", "--normalize",
        "--feature-dtype", "float64", "--seed", 3, "--denoise-from", 103,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    extractor = dsd.FeatureExtractor(
        model, [layer], (0, 100), attention=["up_cross", "down_self"], draws=2, resize=(4, 4), normalize=True,
        dtype="float64", technique=dsd.Technique(denoise_from=103),
    )  # fmt: skip
    expected = extractor.extract(paths, [line["prompt"] for line in lines], 3)
    found = features_of("out")
    assert list(found) == ["1", "2"]
    for number, name in enumerate(found):
        for each in (layer, "attn"):
            assert found[name][each].dtype == torch.float64
            # Values of norm 1: float32 through the network, in batches of another size.
            assert torch.allclose(found[name][each], expected[each][number], rtol=0, atol=1e-4)
    prompts = {row["name"]: row["prompt"] for row in read_index("out").to_pylist()}
    assert prompts == {"1": "a red circle", "2": "a photo of the digit three"}


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["--keep-draws", "--draws", 2, "--pool", "max"], {"keep_draws": True, "draws": 2, "pool": "max"}),
        (["--inversion", "--official-timesteps"], {"official_timesteps": True, "technique": {"inversion": True}}),
        (["--resize", 2, "--image-size", "32x64"], {"resize": 2, "image_size": (32, 64)}),
    ],
)
def test_more_settings(cli, model, images, arguments, settings):
    done = cli("features", images / "1.png", "--out", "out", *COMMON, *arguments)
    assert done.exit_code == 0, done.stderr
    if "technique" in settings:
        settings["technique"] = dsd.Technique(**settings["technique"])
    check(model, "out", ["1"], [images / "1.png"], **settings)


def test_controls_are_those_that_are_named(cli, model, images):
    from dsd_fast.models.controlnet import Control, load_controlnet

    way = dsd.Technique(controls=[Control(load_controlnet("mini"), scale=0.5)])
    # Above the skips that a ControlNet adds to.
    layer = "up-level1-repeat0-res-out"
    done = cli(
        "features", images / "1.png", "--out", "up", "--layers", layer, "--control", "mini", "--control-scale", 0.5
    )
    assert done.exit_code == 0, done.stderr
    check(model, "up", ["1"], [images / "1.png"], layers=[layer], timesteps=(50,), technique=way)
    plain = dsd.FeatureExtractor(model, [layer]).extract([images / "1.png"])[layer][0]
    assert (features_of("up")["1"][layer] - plain).abs().max() > 1e-2


@pytest.mark.parametrize("layout", ["npy-layer", "npy-sample", "npy-aggregated"])
def test_the_official_layouts(cli, model, images, layout):
    done = cli("features", images, "--out", "out", "--layers", LAYERS[1], "--layout", layout)
    assert done.exit_code == 0, done.stderr
    name = {"npy-layer": f"{LAYERS[1]}/deep/7", "npy-sample": f"deep/7/{LAYERS[1]}", "npy-aggregated": "deep/7"}[layout]
    expected = dsd.FeatureExtractor(model, LAYERS[1:]).extract([images / "deep" / "7.png"])
    found = torch.from_numpy(np.load(f"out/{name}.npy", allow_pickle=False))
    whole = expected[LAYERS[1]][0, 0]
    assert torch.allclose(found, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def test_other_settings_for_the_folder_are_refused_by_name(cli, images):
    command = ["features", images, "--out", "out"]
    assert cli(*command, *COMMON).exit_code == 0
    before = files(Path("out"))
    done = cli(*command, "--layers", LAYERS[0], "--timesteps", "50,200", "--seed", 1)
    assert done.exit_code == 2
    assert "Error: --out out holds results made otherwise: layers [" in done.stderr
    assert "seed 0 there, 1 now; run with those settings, or choose another folder" in done.stderr
    assert files(Path("out")) == before


def test_components_are_fitted_once_for_all_runs_and_workers(cli, model, images):
    command = ["features", images, *COMMON, "--pca", 3, "--pca-images", 4]
    for worker in (1, 0):
        done = cli(*command, "--out", "two", "--worker", worker, "--workers", 2)
        assert done.exit_code == 0, done.stderr
    done = cli(*command, "--out", "one")
    assert done.exit_code == 0, done.stderr
    assert Path("two/pca.safetensors").read_bytes() == Path("one/pca.safetensors").read_bytes()
    assert files(Path("two"))["manifest.json"] == files(Path("one"))["manifest.json"]
    extractor = dsd.FeatureExtractor(model, LAYERS, (50, 200))
    pca = extractor.fit_pca([images / f"{number}.png" for number in range(4)], 3)
    names = [str(number) for number in range(7)]
    Path("in/deep").rename("elsewhere")
    found = {name: value for name, value in features_of("one").items() if name in names}
    expected = extractor.extract([images / f"{name}.png" for name in names])
    for number, name in enumerate(names):
        for layer in LAYERS:
            assert found[name][layer].shape[1] == 3
            assert torch.allclose(
                found[name][layer], expected[layer][number], rtol=0, atol=1e-4 * pca[layer].mean.abs().max()
            )
    # Its images have changed, and it goes on with what it began with.
    before = Path("one/pca.safetensors").read_bytes()
    Path("in/0.png").unlink()
    assert cli(*command, "--out", "one").exit_code == 0
    assert Path("one/pca.safetensors").read_bytes() == before
    done = cli(*[2 if part == 3 else part for part in command], "--out", "one")
    assert done.exit_code == 2
    assert "holds results made otherwise: pca." in done.stderr
    assert Path("one/pca.safetensors").read_bytes() == before


def test_four_workers_write_what_one_does(cli, images, bad_images):
    given = [images, *(path for path in bad_images if path.is_file())]
    assert cli("features", *given, "--out", "one", *COMMON).exit_code == 1
    lines = [
        cli("features", *given, "--out", "four", *COMMON, "--worker", worker, "--workers", 4).stdout
        for worker in range(4)
    ]
    one, four = (
        {row.pop("id"): {key: row[key] for key in row if key not in ("shard", "row")} for row in rows}
        for rows in (read_index(name).to_pylist() for name in ("one", "four"))
    )
    assert one == four
    assert sum("images of other workers" in line for line in lines) == 4
    first, second = features_of("one"), features_of("four")
    assert first.keys() == second.keys()
    for name, found in first.items():
        for layer, value in found.items():
            assert torch.allclose(second[name][layer], value, rtol=0, atol=1e-5 * float(value.abs().max()))
    assert files(Path("one"))["manifest.json"] == files(Path("four"))["manifest.json"]


def test_the_results_are_no_input_of_the_next_run(cli, images, monkeypatch):
    monkeypatch.chdir(images)
    command = ["features", ".", "--out", "out", *COMMON]
    assert cli(*command, "--pictures", 2).exit_code == 0
    assert len(list(Path("out/pictures").iterdir())) == 2
    done = cli(*command)
    assert done.stdout.startswith("10 images: 0 done now, 10 before")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "practical-15"], "layers: 'practical-15' is for another network"),
        (["--layers", "nothing"], "layers: got 'nothing', expected one of practical, legacy, all"),
        (["--layers", "up-nothing"], "unknown id 'up-nothing'; the nearest"),
        (["--layers", "missing.json"], "missing.json: No such file or directory"),
        (["--layers", "bad.json"], "layers: bad.json is no JSON"),
        (["--timesteps", "5o"], "--timesteps: '5o' is no list of timesteps, expected for instance 50,200"),
        (["--timesteps", "1000"], "timesteps holds 1000, expected 0 to 999"),
        (["--timesteps", ","], "timesteps: got none"),
        (["--attention", "left"], "attention: got 'left', expected of down_cross"),
        (["--prompt", "a", "--prompts", "p.csv"], "give either --prompt TEXT or --prompts FILE"),
        (["--prompts", "p.csv"], "--prompts: none for"),
        (["--prompt", "word " * 40], "prompts: the prompt has"),
        (["--resize", "big"], "--resize: 'big' is no factor and no size, expected for instance 4 or 16x16"),
        (["--resize", "2", "--pool", "mean"], "resize, pool: both are given"),
        (["--pool", "median"], "pool: got 'median'"),
        (["--feature-dtype", "int8"], "dtype: got 'int8'"),
        (["--pca", "200"], "--pca: components: got 200, expected 1 to "),
        (["--pca", "0"], "Invalid value for '--pca'"),
        (["--control-scale", "2"], "--control-scale: got 1 for 0 --control, expected"),
        (["--control", "none/such/net"], "ControlNet 'none/such/net'"),
        (["--denoise-from", "100", "--inversion"], "inversion, denoise_from: both are given"),
        (["--denoise-steps", "3"], "denoise_steps: given without denoise_from"),
        (["--denoise-from", "40"], "denoise_from: got 40, expected above the timesteps"),
        (["--layout", "zip"], "layout: got 'zip', expected one of shards, npy-layer"),
        (["--worker", "2", "--workers", "2"], "--worker: got 2, expected below --workers, 2"),
        (["--layers", "mid-vit-block0-cross-map", "--pictures", "1"], "--pictures: got layers that are attention maps"),
        (["--memory-budget", "much"], "--memory-budget: 'much' is no size"),
        (["--model", "no/such"], "no/such"),
        (["--out", "a-file"], "--out a-file cannot be written: it is a file"),
        (["--out", "/proc/nothing"], "--out /proc/nothing cannot be written"),
    ],
)
def test_usage_errors_are_one_sentence(cli, images, arguments, message):
    Path("a-file").write_text("not a folder")
    Path("bad.json").write_text("{")
    Path("p.csv").write_text("image,prompt\nother,a\n")
    done = cli("features", images / "1.png", "--out", "out", *arguments)
    assert done.exit_code == 2, done.stdout
    assert message in " ".join(done.stderr.split())
    assert isinstance(done.exception, SystemExit)
    assert not list(Path().rglob("*.safetensors"))


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(cli, images):
    """A limit on the size of files stands in for a disk that is full."""
    command = ["features", str(images), "--out", "out", *map(str, COMMON)]

    def child():
        # An index takes some thousand bytes, and a shard of four images hundreds of thousands, its last one less.
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        with open("told", "w", buffering=1) as sys.stderr:
            command_line(command)

    assert ended(start(child)) == -2
    words = " ".join(Path("told").read_text().split())
    assert "Error: --out out cannot be written: File too large; 0 rows are safe, and the same command goes on" in words
    assert "Traceback" not in words
    assert cli(*command).exit_code == 0
    assert cli(*[part if part != "out" else "whole" for part in command]).exit_code == 0
    assert files(Path("out")) == files(Path("whole"))


def test_an_interrupted_run_goes_on(cli, images, monkeypatch):
    command = ["features", str(images), "--out", "out", *map(str, COMMON), "--memory-budget", "2MiB"]

    def interrupted(*arguments, progress, **options):
        def show(done):
            progress(done)
            if done >= 8:
                signal.raise_signal(signal.SIGINT)

        return extract_to(*arguments, progress=show, **options)

    with monkeypatch.context() as patched:
        patched.setattr("dsd_fast.cli.features.run.extract_to", interrupted)
        done = cli(*command)
    assert done.exit_code == 130
    kept = len(features_of("out"))
    assert kept in (4, 8)
    assert f"10 images: {kept} done now, 0 before, 0 errors, {10 - kept} not reached before the" in done.stdout
    done = cli(*command)
    assert done.exit_code == 0
    assert f"{10 - kept} done now, {kept} before" in done.stdout
    assert read_manifest(Path("out"))["kind"] == "features"


def command_line(arguments):
    """The command as the shell starts it, in this process, which its exit code ends."""
    sys.argv = ["dsd-fast", *map(str, arguments)]
    try:
        main()
    except SystemExit as done:
        os._exit(done.code or 0)
