"""What the shards hold, and that the readers people use take them."""

import io
import json
import os
import tarfile
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dsd_fast.generation.closing import close
from dsd_fast.generation.files import LAYOUTS, image_path, read_images, writer_of
from dsd_fast.jobs import ManifestError, open_manifest, read_index
from tests.generation.pictures import BAD, COUNT, identity, picture, rows, run
from tests.jobs.numbers import files

GOOD = [number for number in range(COUNT) if number not in BAD]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Layout → a closed folder."""
    made = {layout: tmp_path_factory.mktemp(layout) for layout in LAYOUTS}
    for layout, folder in made.items():
        run(folder, layout)
        close(folder)
    return made


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def check(seen: dict) -> None:
    """id → (picture, text, cls) of all good rows."""
    assert set(seen) == {identity(number) for number in GOOD}
    for number in GOOD:
        image, text, cls = seen[identity(number)]
        np.testing.assert_array_equal(np.asarray(image), picture(number))
        row = rows()[number]
        assert (text, cls) == (row.prompt, -1 if row.cls is None else row.cls)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_a_function_of_the_rows(folders, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    run(tmp_path, layout)
    close(tmp_path)
    assert files(tmp_path) == files(folders[layout])


def test_tars_have_the_same_keys_in_every_sample(folders):
    keys = set()
    for shard in (folders["webdataset"] / "shards").iterdir():
        with tarfile.open(shard) as archive:
            members = archive.getmembers()
            assert {(each.mtime, each.uid, each.gid, each.uname, each.mode) for each in members} == {
                (0, 0, 0, "", 0o644)
            }
            names = [each.name for each in members]
            samples = [name.partition(".")[0] for name in names[::4]]
            assert names == [f"{row}.{ending}" for row in samples for ending in ("png", "txt", "json", "cls")]
            keys |= set(samples)
    assert keys == {identity(number) for number in GOOD}


def test_json_leaves_out_what_is_not_set_and_keeps_every_digit_of_a_seed(folders):
    for number, row in enumerate(rows()):
        if number in BAD:
            continue
        shard = next(read_images(folders["webdataset"], [identity(number)]))[1]["shard"]
        with tarfile.open(folders["webdataset"] / "shards" / f"{shard}.tar") as archive:
            told = json.loads(archive.extractfile(f"{identity(number)}.json").read())
        assert told["seed"] == str(row.seed)
        assert told["id"] == identity(number)
        assert ("strength" in told, "negative_prompt" in told, told.get("source_image")) == (
            (True, True, "start.png") if number > 5 else (False, False, None)
        )
        assert not {"clip", "image"} & told.keys()
        assert None not in told.values()


def test_webdataset_reads_shards(folders):
    webdataset = pytest.importorskip("webdataset")
    folder = folders["webdataset"]
    shards = [str(folder / name) for name in (folder / "shards.txt").read_text().split()]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb8"))
    check({each["__key__"]: (each["png"], each["txt"], each["cls"]) for each in samples})
    # The order of the index is the order of the samples.
    index = read_index(folder).to_pylist()
    assert [each["__key__"] for each in samples] == [row["id"] for row in index if row["status"] == "ok"]


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


def test_datasets_reads_shards(folders, datasets, tmp_path):
    folder = folders["webdataset"]
    shards = [str(folder / name) for name in (folder / "shards.txt").read_text().split()]
    given = datasets.load_dataset("webdataset", data_files=shards, split="train", cache_dir=str(tmp_path))
    check({each["__key__"]: (each["png"], each["txt"], each["cls"]) for each in given})
    # The first rows, of which the types are inferred, have less than the last ones.
    assert {each["json"]["seed"] for each in given} == {str(rows()[number].seed) for number in GOOD}


def test_datasets_and_pyarrow_read_parquet(folders, datasets, tmp_path):
    folder = folders["parquet"]
    shards = [str(folder / name) for name in (folder / "shards.txt").read_text().split()]
    given = datasets.load_dataset("parquet", data_files=shards, split="train", cache_dir=str(tmp_path))
    assert isinstance(given.features["image"], datasets.Image)
    check({each["id"]: (each["image"], each["text"], each["cls"]) for each in given})
    table = pq.read_table(shards)
    seen = {each["id"]: (pixels(each["image"]["bytes"]), each["text"], each["cls"]) for each in table.to_pylist()}
    check(seen)
    by_id = {each["id"]: each for each in table.to_pylist()}
    for number in GOOD:
        row, stored = rows()[number], by_id[identity(number)]
        assert (stored["seed"], stored["strength"], stored["label"]) == (row.seed, row.strength, row.label)
        assert stored["image"]["path"] == f"{identity(number)}.png"


def test_datasets_reads_the_folder(folders, datasets, tmp_path):
    given = datasets.load_dataset(
        "imagefolder", data_dir=str(folders["folder"] / "images"), split="train", cache_dir=str(tmp_path)
    )
    check({each["id"]: (each["image"], each["text"], -1 if each["cls"] is None else each["cls"]) for each in given})
    assert {each["seed"] for each in given} == {str(rows()[number].seed) for number in GOOD}


def test_no_class_is_taken_for_a_split(datasets, monkeypatch, tmp_path):
    monkeypatch.setattr("tests.generation.pictures.LABELS", ["cat", "train", "test tube", "metadata.jsonl"])
    run(tmp_path / "set", "folder", bad=())
    close(tmp_path / "set")
    given = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "set/images"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(given) == COUNT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_images(folders, layout):
    for number in GOOD:
        content, row = next(read_images(folders[layout], [identity(number)]))
        np.testing.assert_array_equal(pixels(content), picture(number))
        assert (row["id"], row["seed"], row["name"]) == (identity(number), rows()[number].seed, f"n{number}")
    with pytest.raises(ValueError, match=r"has no image: not-accepted: 4 was never accepted"):
        next(read_images(folders[layout], [identity(4)]))
    with pytest.raises(ValueError, match=r"has no row 'ab', expected the id of one"):
        next(read_images(folders[layout], ["ab"]))


def test_a_folder_of_another_kind_is_refused(tmp_path):
    open_manifest(tmp_path, "features", {"layout": "shards"})
    for call in (close, lambda folder: next(read_images(folder, ["ab"]))):
        with pytest.raises(ManifestError, match="holds results of features, expected generated images"):
            call(tmp_path)


def test_folders_of_classes():
    row = "ab" * 16
    labels = [
        "cat", "Cat", "tree frog", "a/b", "a%2Fb", "..", ".", "...", ".x", "%2Ex", "__pycache__", "_x", "日本", "[a]*?",
        " ", "a ", "a.", "a%2E", "x" * 400, "x" * 401, "\udc80", "\x00", "a\nb",
        "train", "%74rain", "bullet train", "éval", "test.", "constrain", "trains", "dev-val", "metadata.jsonl",
    ]  # fmt: skip
    paths = [image_path(row, label, "jpg") for label in labels]
    assert len(set(paths)) == len(labels)
    assert paths[:3] == [f"{label}/{row}.jpg" for label in labels[:3]]
    for path in paths:
        name = path.removesuffix(f"/{row}.jpg")
        assert name.isascii()
        assert 0 < len(name) < 255
        assert name[0] not in "._ "
        assert name[-1] not in ". "
        assert not set(name) & set('/\\[]*?{}<>|"\n\0:')
    words = ["%74rain", "bullet %74rain", "constrain", "trains", "%64ev-%76al", "%6Detadata.jsonl"]
    given = ["train", "bullet train", "constrain", "trains", "dev-val", "metadata.jsonl"]
    assert [image_path(row, label, "jpg") for label in given] == [f"{word}/{row}.jpg" for word in words]
    # As the index, of which the closing step reads it, has it.
    assert image_path(row, "\\udc80", "jpg") == image_path(row, "\udc80", "jpg")
    assert image_path(row, None, "png") == image_path(row, "", "png") == f"ab/{row}.png"


def test_unknown_layout():
    with pytest.raises(ValueError, match=r"layout: got 'zip', expected one of webdataset, parquet, folder"):
        writer_of("zip", "png", {})
