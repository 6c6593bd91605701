"""Images into a folder: each as its row alone gives it, whatever it was made with, and shards that follow from rows."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from dsd_fast.generation import GenerateConfig, GenerateRow, Sampler, to_uint8
from dsd_fast.generation.accept import Judge, Verdict
from dsd_fast.generation.again import again, config_of
from dsd_fast.generation.export import generate_to
from dsd_fast.generation.files import read_images
from dsd_fast.generation.rows import from_columns
from dsd_fast.generation.units import try_seed
from dsd_fast.jobs import ManifestError, read_index
from tests.tiny import tiny_pipeline

PROMPTS = ("a red cat", "a dog", "red")


@pytest.fixture(scope="module")
def model():
    return dsd.from_pipeline(tiny_pipeline("sd15"))


@pytest.fixture
def sampler(model):
    return Sampler(model, GenerateConfig(steps=2, guidance=2.0, scheduler="ddim"))


def rows_of(count, **more):
    return [GenerateRow(PROMPTS[number % 3], number, **more) for number in range(count)]


def pixels_of(folder, row):
    with Image.open(io.BytesIO(next(read_images(folder, [row]))[0])) as image:
        return np.asarray(image).astype(int)


def alone(sampler, row):
    """The oracle: the row by itself, without a job."""
    return to_uint8(sampler.pixels([sampler.resolve(row)]))[0].numpy().astype(int)


def tars(folder):
    """Name of a shard without its number → bytes."""
    return {file.name.split("-", 1)[1]: file.read_bytes() for file in (Path(folder) / "shards").iterdir()}


def members(folder):
    """File of a sample → bytes, of all shards."""
    found = {}
    for file in sorted((Path(folder) / "shards").iterdir()):
        with tarfile.open(file) as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}
    return found


@pytest.fixture
def recorded(monkeypatch):
    """The seeds of the rows of each call of the sampler."""
    calls, pixels = [], Sampler.pixels

    def record(self, rows):
        calls.append([row.seed for row in rows])
        return pixels(self, rows)

    monkeypatch.setattr(Sampler, "pixels", record)
    return calls


def test_each_row_has_its_own_image_and_what_cannot_be_made_is_a_row_with_its_reason(sampler, recorded, tmp_path):
    picture, broken = tmp_path / "a.png", tmp_path / "b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(picture)
    broken.write_bytes(picture.read_bytes()[:200])
    rows = [
        GenerateRow("a red cat", 0),
        GenerateRow("a dog", 1, size=(32, 64)),
        GenerateRow("red", 2, image=picture, strength=0.5),
        GenerateRow("red", 3, image=broken),
        GenerateRow("a dog", 4, steps=3, guidance=1.0, label="dog", cls=7, name="the fifth"),
        GenerateRow("red " * 100, 5),
        GenerateRow("red", 6, size=(33, 64)),
        GenerateRow("red", 7, image=picture, negative_prompt="a cat"),
        GenerateRow("a red cat", 0),
        GenerateRow("red", 1 << 63),
    ]
    seen = []
    made = generate_to(sampler, iter(rows), tmp_path / "out", shard_rows=4, batch=2, progress=seen.append)
    counts = made.counts
    assert (counts.inputs, counts.ok, counts.errors, counts.duplicates) == (10, 6, 3, 1)
    assert seen == sorted(seen)
    assert seen[-1] == 10
    # Rows of one size, number of steps and kind of start go together, inside a shard alone.
    assert recorded == [[0], [1], [2], [4], [7], [1 << 63]]
    index = read_index(tmp_path / "out").to_pylist()
    assert [row["seed"] for row in index] == [0, 1, 2, 3, 4, 5, 6, 7, 1 << 63]
    reasons = {row["seed"]: row["reason"] for row in index if row["status"] != "ok"}
    assert reasons == {3: "truncated", 5: "refused", 6: "refused"}
    assert index[6]["message"].startswith("size: got (33, 64), expected multiples of")
    assert index[4]["name"] == "the fifth"
    for row, given in zip(index, rows[:8] + rows[9:], strict=True):
        # What the index has is the row as it was given: the configuration stands in the manifest.
        assert from_columns(row) == given
        if row["status"] == "ok":
            # Batches of two against one: float32's rounding, in the end at most one level.
            assert np.abs(pixels_of(tmp_path / "out", row["id"]) - alone(sampler, given)).max() <= 1
    assert made.closed["images"] == 6
    assert made.closed["errors"] == {"refused": 2, "truncated": 1}
    samples = members(tmp_path / "out")
    assert len(samples) == 6 * 4
    about = json.loads(samples[f"{index[4]['id']}.json"])
    assert (about["steps"], about["guidance"], about["scheduler"], about["seed"]) == (3, 1.0, "ddim", "4")
    assert (samples[f"{index[4]['id']}.cls"], samples[f"{index[0]['id']}.cls"]) == (b"7", b"-1")
    assert samples[f"{index[1]['id']}.txt"] == b"a dog"


def test_pixels_that_are_no_numbers_are_an_error(sampler, tmp_path, monkeypatch):
    pixels = Sampler.pixels

    def spoilt(self, rows):
        found = pixels(self, rows)
        found[[row.seed == 2 for row in rows], 0, 3, 3] = torch.nan
        return found

    monkeypatch.setattr(Sampler, "pixels", spoilt)
    assert generate_to(sampler, rows_of(4), tmp_path, batch=4).counts.errors == 1
    reasons = {row["seed"]: row["reason"] for row in read_index(tmp_path).to_pylist()}
    assert reasons == {0: "", 1: "", 2: "not-finite", 3: ""}


def test_batches_never_cross_a_shard_whose_bytes_follow_from_its_rows(sampler, recorded, tmp_path):
    rows = rows_of(11)
    generate_to(sampler, rows, tmp_path / "whole", shard_rows=5, batch=3)
    assert recorded == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9], [10]]
    # Another job, in which other rows come before.
    generate_to(sampler, [*rows_of(5, steps=1), *rows[5:10]], tmp_path / "part", shard_rows=5, batch=3)
    whole, part = tars(tmp_path / "whole"), tars(tmp_path / "part")
    assert (len(whole), len(part)) == (3, 2)
    (common,) = whole.keys() & part.keys()
    assert whole[common] == part[common]


def test_other_workers_and_batches_give_the_same_rows_and_any_is_made_again_alone(model, tmp_path):
    sampler, rows = Sampler(model, GenerateConfig(steps=2, guidance=1.0, scheduler="euler-a")), rows_of(100)
    generate_to(sampler, rows, tmp_path / "one", shard_rows=50, batch=8)
    closed = [
        generate_to(sampler, rows, tmp_path / "two", shard_rows=16, batch=5, worker=worker, workers=2).closed
        for worker in (1, 0)
    ]
    # The last one closes the folder.
    assert closed[0] is None
    assert closed[1]["images"] == 100
    one, two = members(tmp_path / "one"), members(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one if not name.endswith(".png"))
    names = read_index(tmp_path / "one", [])["id"].to_pylist()
    # From the folder alone: another sampler, of its manifest.
    other = Sampler(model, config_of(tmp_path / "two"))
    for name, found in zip(names, again(other, tmp_path / "two", names), strict=True):
        assert found.row["id"] == name
        assert found.same
        assert found.largest <= 1
        assert np.abs(pixels_of(tmp_path / "one", name) - found.kept).max() <= 1


def test_a_row_is_not_made_again_by_what_did_not_make_it(model, sampler, tmp_path):
    picture = tmp_path / "a.png"
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(picture)
    rows = [GenerateRow("red", 0, image=picture), GenerateRow("red", 1, image=np.zeros((64, 64, 3), np.uint8))]
    for format in ("png", "jpg", "webp"):
        generate_to(sampler, rows, tmp_path / format, format=format)
        name = read_index(tmp_path / format, [])["id"][0].as_py()
        (found,) = again(Sampler(model, config_of(tmp_path / format)), tmp_path / format, [name])
        assert found.same
        assert found.row["prompt"] == "red"
    with pytest.raises(ManifestError, match=r"config\.steps 2 there, 3 now"):
        next(again(Sampler(model, GenerateConfig(steps=3, guidance=2.0, scheduler="ddim")), tmp_path / "png", [name]))
    with pytest.raises(ValueError, match="it was given as an object"):
        next(again(sampler, tmp_path / "png", read_index(tmp_path / "png", [])["id"].to_pylist()[1:]))
    # A source that has changed is told before its image is taken for another one.
    Image.fromarray(np.full((64, 64, 3), 91, np.uint8)).save(picture)
    with pytest.raises(ValueError, match="one is another now"):
        next(again(sampler, tmp_path / "png", [name]))


def reject_even(images, rows):
    """By the seed, which every try has its own of."""
    return [row.seed % 2 == 1 for row in rows]


def test_units_are_tried_until_one_is_accepted(sampler, tmp_path):
    templates = [GenerateRow("a red cat", 3, label="cat", cls=0), GenerateRow("a dog", 3, label="dog", cls=1)]
    options = {"accept": reject_even, "per_class": 5, "max_tries": 2, "layout": "parquet"}
    made = generate_to(sampler, templates, tmp_path / "a", shard_rows=4, batch=3, **options)
    rows = read_index(tmp_path / "a").to_pylist()
    assert [row["label"] for row in rows] == ["cat", "dog"] * 5
    for number, row in enumerate(rows):
        seeds = [try_seed(3, row["label"], number // 2, j) for j in range(2)]
        good = [seed % 2 == 1 for seed in seeds]
        tries = [int(each["seed"]) for each in json.loads(row["tries"] or "[]")]
        if True in good:
            assert row["seed"] == seeds[good.index(True)]
            assert tries == seeds[: good.index(True)]
            expected = alone(sampler, GenerateRow(row["prompt"], row["seed"]))
            assert np.abs(pixels_of(tmp_path / "a", row["id"]) - expected).max() <= 1
        else:
            assert (row["reason"], tries) == ("not-accepted", seeds)
            assert row["message"] == "none of 2 tries was accepted: 2 × rejected"
    assert {row["status"] for row in rows} == {"ok", "error"}
    assert all(
        each.same for each in again(sampler, tmp_path / "a", [row["id"] for row in rows if row["row"] is not None])
    )
    assert made.closed["rejected"] == {"rejected": sum(len(json.loads(row["tries"] or "[]")) for row in rows)}
    assert [each["label"] for each in made.closed["classes"]] == ["cat", "dog"]
    # More of each class go into the same folder.
    more = generate_to(sampler, templates, tmp_path / "a", batch=2, **options | {"per_class": 6})
    assert (more.counts.done, more.counts.ok + more.counts.errors) == (10, 2)
    with pytest.raises(ManifestError, match="max_tries 2 there, 4 now"):
        generate_to(sampler, templates, tmp_path / "a", **options | {"max_tries": 4})


def test_images_of_a_class_have_their_own_seeds_without_a_judge_too(sampler, tmp_path):
    templates = [GenerateRow("a red cat", 3, label="cat", cls=0), GenerateRow("a dog", 3, label="dog", cls=1)]
    generate_to(sampler, templates, tmp_path, per_class=2, layout="parquet")
    for number, row in enumerate(read_index(tmp_path).to_pylist()):
        assert row["seed"] == try_seed(3, row["label"], number // 2, 0)
        expected = alone(sampler, GenerateRow(row["prompt"], row["seed"]))
        assert np.abs(pixels_of(tmp_path, row["id"]) - expected).max() <= 1


class OfCats(Judge):
    """Its scores differ from batch to batch, as those of any network do in their last digits."""

    def check(self, row):
        if row.label != "cat":
            raise ValueError(f"label: got {row.label!r}, expected 'cat'")

    def __call__(self, images, rows):
        assert {row.label for row in rows} == {"cat"}
        return [Verdict(row.seed > 0, "low", 1 / len(rows)) for row in rows]


def test_a_judge_has_few_source_images_in_memory(sampler, tmp_path, monkeypatch):
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "a.png")
    rows = [GenerateRow("a", seed, image=tmp_path / name) for seed, name in ((1, "a.png"), (2, "none.png"))]
    held, pixels = [], Sampler.pixels

    def recording(self, batch):
        held.extend(row.image for row in batch)
        return pixels(self, batch)

    monkeypatch.setattr(Sampler, "pixels", recording)
    generate_to(sampler, rows, tmp_path / "a", accept=reject_even)
    assert held == [tmp_path / "a.png"]
    made, missing = read_index(tmp_path / "a").to_pylist()
    assert (made["status"], missing["reason"]) == ("ok", "missing")
    monkeypatch.undo()
    assert np.abs(pixels_of(tmp_path / "a", made["id"]) - alone(sampler, rows[0])).max() <= 1


def test_what_cannot_be_judged_is_an_error_row_and_scores_are_no_part_of_a_sample(sampler, tmp_path):
    rows = [GenerateRow("red", seed, label=label) for seed, label in enumerate(["cat", "dog", None, "cat"])]
    for batch in (1, 2):
        generate_to(sampler, rows, tmp_path / str(batch), accept=OfCats(0.5), batch=batch)
    found = read_index(tmp_path / "2").to_pylist()
    assert [row["reason"] for row in found] == ["", "refused", "refused", ""]
    assert found[1]["message"] == "label: got 'dog', expected 'cat'"
    assert found[3]["score"] == 0.5 != read_index(tmp_path / "1").to_pylist()[3]["score"]
    one, two = (members(tmp_path / str(batch)) for batch in (1, 2))
    texts = [name for name in one if not name.endswith("png")]
    assert len(texts) == 6
    assert [one[name] for name in texts] == [two[name] for name in texts]


def test_what_does_not_fit_is_refused_before_there_is_a_folder(sampler, tmp_path):
    for options, message in (
        ({"layout": "zip"}, "layout: got 'zip'"),
        ({"format": "gif"}, "format: got 'gif'"),
        ({"quality": 90}, "quality: got 90 for png"),
        ({"shard_rows": 0}, "shard_rows: got 0, expected at least 1"),
        ({"batch": 0}, "batch: got 0, expected at least 1"),
        ({"max_tries": 0}, "max_tries: got 0, expected at least 1"),
        ({"accept": lambda images, rows: [True] * len(rows)}, "which a later run could not tell from another"),
        ({"near_duplicates": 0.9}, "has no CLIP"),
        ({"worker": 2, "workers": 2}, "worker is 2, expected 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_to(sampler, rows_of(1), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_the_format_cannot_hold_is_an_error_row(sampler, tmp_path):
    rows = [GenerateRow("red", 0), GenerateRow("red", 1, size=(64, 16_384))]
    generate_to(sampler, rows, tmp_path, format="webp")
    whole, large = read_index(tmp_path).to_pylist()
    assert (whole["status"], large["reason"]) == ("ok", "refused")
    assert large["message"] == "size: got (64, 16384), expected sides of at most 16383 pixels, which webp holds"


class Empty:
    """A judge that has a length, which is 0."""

    def __len__(self):
        return 0

    def __repr__(self):
        return "Empty()"

    def __call__(self, images, rows):
        return [False] * len(rows)


def test_a_judge_counts_whatever_its_truth(sampler, tmp_path):
    generate_to(sampler, [GenerateRow("red", 0)], tmp_path, accept=Empty(), max_tries=1)
    (row,) = read_index(tmp_path).to_pylist()
    assert (row["reason"], len(json.loads(row["tries"]))) == ("not-accepted", 1)
