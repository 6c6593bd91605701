"""Image prompts of many images in a folder: what lies there, what is made again, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter
from dsd_fast.jobs import Counts, ManifestError, read_index
from tests.image_prompt.test_converter import Constant


@pytest.fixture(scope="module")
def converter():
    return ImagePromptConverter(dsd.load("mini"), config=ImagePromptConfig(cut=0.5, norm=11.0, batch=3))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten images in files, of which the fourth is damaged."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"p{number}.png" for number in range(10)]
    for number, path in enumerate(paths):
        Image.fromarray(draw.integers(0, 256, (40 + 3 * number, 64, 3), np.uint8)).save(path)
    paths[3].write_bytes(paths[3].read_bytes()[:100])
    return paths


def contents(folder):
    """Of all files but those that tell times."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("timeline"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_folder_is_read_as_the_prompts_of_its_images(converter, pictures, tmp_path):
    texts = ["a red ring"] * 5 + [""] * 4 + ["word " * 30]
    seen = []
    done = converter.convert_to(tmp_path / "out", pictures, texts, 0.5, norm=3.0, shard_rows=4, progress=seen.append)
    assert done.counts == Counts(inputs=10, ok=8, errors=2)
    assert seen[-1] == 10
    rows = read_index(tmp_path / "out").to_pylist()
    assert [row["name"] for row in rows] == [path.stem for path in pictures]
    assert [row["reason"] for row in rows if row["reason"]] == ["truncated", "prompt-too-long"]
    assert (rows[1]["path"], rows[1]["prompt"], rows[1]["height"], rows[1]["width"]) == (
        str(pictures[1]), "a red ring", 43, 64,
    )  # fmt: skip
    got = ImagePrompt.load(tmp_path / "out")
    good = [number for number in range(9) if number != 3]
    want = converter.edit([pictures[n] for n in good], [texts[n] for n in good], 0.5, norm=3.0)
    assert got.names == want.names
    assert got.settings == want.settings
    assert got.settings["norm"] == 3.0
    # Other batches: three layers of float32.
    torch.testing.assert_close(got.embeds, want.embeds, rtol=0, atol=1e-5 * float(want.embeds.abs().max()))


def test_what_is_stopped_goes_on_to_the_same_bytes(converter, pictures, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    converter.convert_to(whole, pictures, shard_rows=4)

    def stop(done):
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converter.convert_to(parts, pictures, shard_rows=4, progress=stop)
    assert len(read_index(parts)) == 4
    assert converter.convert_to(parts, pictures, shard_rows=4).counts == Counts(
        inputs=10, ok=6, errors=0, done=4, done_errors=1
    )
    assert contents(parts) == contents(whole)


def test_workers_share_the_images(converter, pictures, tmp_path):
    for worker in range(2):
        converter.convert_to(tmp_path / "two", pictures, worker=worker, workers=2)
    converter.convert_to(tmp_path / "one", pictures)
    one, two = (ImagePrompt.load(tmp_path / name) for name in ("one", "two"))
    assert sorted(one.names) == sorted(two.names)
    order = [two.names.index(name) for name in one.names]
    torch.testing.assert_close(two[order].vectors, one.vectors, rtol=0, atol=1e-5 * float(one.vectors.abs().max()))


def test_other_answers_are_refused_by_the_folder(converter, pictures, tmp_path):
    converter.convert_to(tmp_path, pictures[:1])
    other = ImagePromptConverter(converter.model, config=ImagePromptConfig(cut=0.6, norm=11.0, batch=3))
    tower = converter.with_vision(Constant(converter.vision.config))
    for call, key in (
        (lambda: converter.convert_to(tmp_path, pictures, alpha=0.1), "alpha"),
        (lambda: converter.convert_to(tmp_path, pictures, norm=5), "norm"),
        (lambda: converter.convert_to(tmp_path, pictures, "a ring"), "prompts"),
        (lambda: other.convert_to(tmp_path, pictures), "cut"),
        (lambda: tower.convert_to(tmp_path, pictures), "weights"),
    ):
        with pytest.raises(ManifestError, match=f"{key} "):
            call()


def test_what_is_wrong_is_refused_before_a_folder_is_made(converter, pictures, tmp_path):
    out = tmp_path / "out"
    for given, message in (
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"norm": -1}, "norm: got -1"),
        ({"prompts": "word " * 30}, "prompts: the prompt has"),
        ({"names": ["a"]}, "names: got 1 for 10 images"),
        ({"shard_rows": 0}, "shard_rows is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            converter.convert_to(out, pictures, **given)
    with pytest.raises(ValueError, match="images: got one"):
        converter.convert_to(out, pictures[0])
    assert not out.exists()


def test_errors_alone_and_none_at_all(converter, pictures, tmp_path):
    assert converter.convert_to(tmp_path / "none", []).counts == Counts()
    shutil.copy(pictures[3], tmp_path / "bad.png")
    assert converter.convert_to(tmp_path / "bad", [tmp_path / "bad.png"]).counts == Counts(inputs=1, errors=1)
    shutil.copy(pictures[4], tmp_path / "bad.png")
    done = converter.convert_to(tmp_path / "bad", [tmp_path / "bad.png"], retry_errors=True)
    assert done.counts == Counts(inputs=1, ok=1)
    assert len(ImagePrompt.load(tmp_path / "bad")) == 1
