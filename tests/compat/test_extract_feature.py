"""The official script: its options, and its files with the values of the plain way."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from dsd_fast.compat.extract_feature import _parser, main
from dsd_fast.jobs import read_index
from dsd_fast.reference import features as reference

# In the order of execution, of sides 4, 8 and 8.
LAYERS = ["mid-vit-block0-self-k", "up-level1-repeat0-vit-block0-cross-q", "up-level1-repeat1-res-out"]
PROMPT = "a small red circle"
IMAGES = ["a/one.png", "a/two.x.png", "b/one.png"]

OFFICIAL = {
    *("--layer", "--version", "--dtype", "--offline_lora", "--offline_lora_filename", "--feature_resize", "--control"),
    *("--attention", "--img_size", "--batch_size", "-b", "--t", "--denoising_from", "--use_ddim_inversion"),
    *("--input_dir", "--nested_input_dir", "--prompt_file", "--output_dir", "--aggregate_output"),
    *("--use_original_filename", "--split", "--sample_name_first", "--show_all_layers"),
}
OWN = {"--model", "--device", "--seed", "-h", "--help"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of three images, the layers and the prompt; and the features of the plain way, float16 and by image."""
    folder = tmp_path_factory.mktemp("given")
    generator = np.random.default_rng(0)
    pictures = []
    for name in IMAGES:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.append(Image.fromarray(generator.integers(0, 256, (50, 70, 3), dtype=np.uint8)))
        pictures[-1].save(path)
    # Neither order nor what is not wanted counts.
    (folder / "layers.json").write_text(json.dumps({**dict.fromkeys(LAYERS[::-1], True), "unet-in": False}))
    (folder / "prompt.txt").write_text(PROMPT + "\n")
    pipe = dsd.load("mini").to_pipeline()
    found = reference.extract(
        pipe, pictures, layers=LAYERS, timesteps=(50,), prompts=PROMPT, seed=4, official_timesteps=True, batch_size=3
    )
    return folder, {name: value[:, 0].half().numpy() for name, value in found.items()}


def run(folder, out, *options, **changed):
    settings = {
        "model": "mini",
        "dtype": "float32",
        "device": "cpu",
        "t": 50,
        "seed": 4,
        "layer": folder / "layers.json",
        "prompt_file": folder / "prompt.txt",
        "input_dir": f"{folder}/images/**/*.png",
        "output_dir": out,
    } | changed
    given = [part for key, value in settings.items() if value is not None for part in (f"--{key}", str(value))]
    return main([*given, *options])


def arrays(folder):
    """Paths of the .npy files → their arrays."""
    return {path.relative_to(folder).as_posix(): np.load(path) for path in Path(folder).rglob("*.npy")}


def assert_near(found, expected):
    assert found.dtype == np.float16
    # Two roundings to 2^-11; float32's at single positions of the mini model's middle: 1e-4 of the largest, some 10.
    np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=2**-10, atol=2e-3)


def test_options_are_the_official_ones_and_a_few_more():
    assert {name for action in _parser()._actions for name in action.option_strings} == OFFICIAL | OWN
    args = _parser().parse_args([])
    official = {"dtype": "float16", "feature_resize": 1, "prompt_file": "prompt.txt", "output_dir": "./output/"}
    official |= {"split": "train", "nested_input_dir": False, "aggregate_output": False, "sample_name_first": False}
    assert {name: getattr(args, name) for name in official} == official


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ([], lambda number, layer: f"{layer}/train{number}.npy"),
        (["--split", "test", "--sample_name_first"], lambda number, layer: f"test{number}/{layer}.npy"),
        (
            ["--use_original_filename", "--nested_input_dir"],
            lambda number, layer: f"{layer}/{IMAGES[number].removesuffix('.png')}.npy",
        ),
    ],
    ids=["layer", "sample", "nested"],
)
def test_files_have_the_official_names_shapes_and_values(files, tmp_path, options, path):
    folder, expected = files
    assert run(folder, tmp_path / "out", *options) == 0
    found = arrays(tmp_path / "out")
    assert set(found) == {path(number, layer) for number in range(3) for layer in LAYERS}
    for layer in LAYERS:
        for number in range(3):
            assert found[path(number, layer)].shape == expected[layer].shape[1:]
            assert_near(found[path(number, layer)], expected[layer][number])


def test_aggregated_files_hold_all_layers_at_the_largest_size(files, tmp_path):
    folder, expected = files
    only = {"input_dir": f"{folder}/images/a/*.png"}
    assert run(folder, tmp_path / "out", "--aggregate_output", "--use_original_filename", "-b", "1", **only) == 0
    found = arrays(tmp_path / "out")
    assert set(found) == {"one.npy", "two.x.npy"}
    side = max(value.shape[-1] for value in expected.values())
    for number, name in enumerate(["one.npy", "two.x.npy"]):
        large = [
            value[number].repeat(side // value.shape[-1], 1).repeat(side // value.shape[-1], 2)
            for value in expected.values()
        ]
        assert_near(found[name], np.concatenate(large))


def test_other_settings_reach_the_engine(files, tmp_path):
    folder, _ = files
    given = {"input_dir": f"{folder}/images/a/one.png", "img_size": 32, "t": 20}
    assert run(folder, tmp_path / "out", "--attention", "up_cross", "--use_ddim_inversion", **given) == 0
    picture = Image.open(folder / "images/a/one.png").resize((32, 32))
    pipe = dsd.load("mini").to_pipeline()
    latents = dsd.load("mini").encode_images(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255 * 2 - 1)
    expected = reference.extract(
        pipe,
        [picture],
        latents=latents.detach(),
        layers=LAYERS,
        timesteps=(20,),
        prompts=PROMPT,
        attention=["up_cross"],
        inversion=True,
        official_timesteps=True,
    )
    found = arrays(tmp_path / "out")
    assert set(found) == {f"{name}/train0.npy" for name in [*LAYERS, "attn"]}
    for name, value in expected.items():
        assert_near(found[f"{name}/train0.npy"], value[0, 0].numpy())
    assert run(folder, tmp_path / "small", "--attention", "up_cross", feature_resize=3, **given) == 0
    sides = {path.split("/")[0]: value.shape[1:] for path, value in arrays(tmp_path / "small").items()}
    # Latents of side 8: 2, 4 and 4 become at least 1; attention stays as it is.
    assert sides == {**dict.fromkeys(LAYERS, (1, 1)), "attn": (8, 8)}


def test_a_run_goes_on_and_refuses_other_settings(files, tmp_path, capsys):
    folder, _ = files
    out = tmp_path / "out"
    assert run(folder, out, input_dir=f"{folder}/images/a/*.png") == 0
    before = {path: value.tobytes() for path, value in arrays(out).items()}
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    capsys.readouterr()
    assert run(folder, out) == 0
    assert "1 images written, 2 were there" in capsys.readouterr().out
    assert len(arrays(out)) == 9
    assert {path: value.tobytes() for path, value in arrays(out).items() if path in before} == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert run(folder, out, t=60) == 1
    assert "timesteps" in capsys.readouterr().err


def test_images_that_cannot_be_used_are_told(files, tmp_path, capsys):
    folder, expected = files
    given = tmp_path / "given"
    given.mkdir()
    (given / "0.png").write_text("no image")
    (given / "1.png").write_bytes((folder / "images" / IMAGES[0]).read_bytes())
    for _ in range(2):
        assert run(folder, tmp_path / "out", input_dir=f"{given}/*.png") == 1
        assert "train0: " in (told := capsys.readouterr().err)
        assert "not a JPEG, PNG or WebP" in told
    found = arrays(tmp_path / "out")
    assert set(found) == {f"{layer}/train1.npy" for layer in LAYERS}
    assert_near(found[f"{LAYERS[1]}/train1.npy"], expected[LAYERS[1]][0])
    assert read_index(tmp_path / "out")["status"].to_pylist() == ["error", "ok"]


def test_all_layers_are_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "mini", "--device", "cpu", "--dtype", "float32", "--show_all_layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ids = dsd.unet.UNetProgram(dsd.load("mini").unet).layer_ids
    assert [line.split()[0] for line in lines] == list(ids)
    assert "up-level1-repeat0-vit-block0-cross-q torch.Size([96, 8, 8])" in lines
    assert json.loads((tmp_path / "layer_record.json").read_text()) == dict.fromkeys(ids, True)


def test_bad_settings_are_named(files, tmp_path, capsys):
    folder, _ = files
    cases = [
        ({"input_dir": f"{folder}/none/*.png"}, [], "--input_dir: no file matches"),
        ({"prompt_file": folder / "none.txt"}, [], "none.txt"),
        ({"layer": folder / "prompt.txt"}, [], "is no JSON"),
        ({"model": folder / "none"}, [], "none"),
        ({"version": "xl"}, [], "version: got 'xl'"),
        ({"version": "flux", "model": None}, [], "version: 'flux'"),
        ({"version": "9", "model": None}, [], "version: got '9'"),
        ({"device": "cuda:99"}, [], "cuda:99"),
        ({"feature_resize": 0}, [], "--feature_resize: got 0"),
        ({"img_size": 63}, [], "image_size"),
        ({}, ["--control", "depth"], "control: 'depth'"),
        ({"offline_lora": "x"}, [], "offline_lora"),
        ({}, ["--use_original_filename"], "'one' stands for several"),
        ({"batch_size": 0}, [], "--batch_size: got 0, expected at least 1"),
    ]
    for changed, options, message in cases:
        assert run(folder, tmp_path / "out", *options, **changed) == 1
        assert message in capsys.readouterr().err
    for missing in ("layer", "t", "input_dir"):
        with pytest.raises(SystemExit, match="2"):
            run(folder, tmp_path / "out", **{missing: None})
        assert f"--{missing}" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.npy"))


def test_it_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["extract_feature", "--help"])
    monkeypatch.delitem(sys.modules, "dsd_fast.compat.extract_feature")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("dsd_fast.compat.extract_feature", run_name="__main__")
    assert "--sample_name_first" in capsys.readouterr().out
