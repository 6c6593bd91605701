"""A row's id is its content's, and the index's columns make it again."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dsd_fast.generation.rows import COLUMNS, GenerateRow, columns, from_columns, identified, row_id_of
from dsd_fast.images import load_image

FULL = GenerateRow(
    "naïve 熊 🐻", 2**64 - 1, "", (64, 96), 20, 7.1, 0.7, 2, Path("a/b.png"), 0.3, (Path("c.png"), Path("d.png")),
    ("one", "two"), (1024, 512), (0, 3), (512, 1024), "bear", 0, "first",
)  # fmt: skip


def picture(file, value=0):
    Image.new("RGB", (4, 4), (value, 1, 2)).save(file)
    return file


def test_the_index_makes_the_row_again(tmp_path):
    rows = [FULL, GenerateRow("a"), GenerateRow("", adapter=()), replace(FULL, conditions=(), image=None, size=None)]
    named = [{"name": row.name, "shard": "x", **columns(row)} for row in rows]
    arrays = {name: pa.array([row[name] for row in named], pa.type_for_alias(kind)) for name, kind in COLUMNS.items()}
    pq.write_table(pa.table({**arrays, "name": [row.name for row in rows]}), tmp_path / "index.parquet")
    assert list(map(from_columns, pq.read_table(tmp_path / "index.parquet").to_pylist())) == rows


def test_relative_paths_are_as_seen_from_the_folder_of_the_index(tmp_path, monkeypatch):
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "folder").symlink_to(tmp_path / "disk" / "folder")
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png")
    row = GenerateRow("a", image=Path("a.png"), conditions=(tmp_path / "b.png", Path("c.png")))
    values = columns(row, "folder")
    assert (values["image"], values["conditions"]) == ("../../a.png", f'["{tmp_path}/b.png", "../../c.png"]')
    monkeypatch.chdir("/")
    found = from_columns(values, tmp_path / "folder")
    assert found.image.samefile(tmp_path / "a.png")
    assert found.conditions[0] == row.conditions[0]


def test_all_that_a_row_says_is_in_its_id():
    base = row_id_of(FULL, ["1", "2", "3"])
    assert base == row_id_of(replace(FULL, image=Path("elsewhere"), conditions=(Path("e"), Path("f"))), ["1", "2", "3"])
    others = {
        "prompt": "x", "seed": 2**64 - 2, "negative_prompt": None, "size": (96, 64), "steps": 21, "guidance": 7.2,
        "guidance_rescale": None, "clip_skip": 1, "strength": 0.4, "adapter": (), "original_size": None, "crop": (3, 0),
        "target_size": (1, 2), "label": "b", "cls": None, "name": "",
    }  # fmt: skip
    assert others.keys() == {field.name for field in fields(GenerateRow)} - {"image", "conditions"}
    ids = {row_id_of(replace(FULL, **{name: value}), ["1", "2", "3"]) for name, value in others.items()}
    ids |= {row_id_of(FULL, ["1", "3", "2"]), row_id_of(FULL, ["1", "2", "4"])}
    one = Path("x")
    ids |= {row_id_of(GenerateRow("a", image=one), ["1"]), row_id_of(GenerateRow("a", conditions=(one,)), ["1"])}
    ids |= {row_id_of(GenerateRow("a")), row_id_of(GenerateRow("a", negative_prompt="b"))}
    assert len(ids | {base}) == len(others) + 7
    # What folders hold is found again by later versions.
    assert row_id_of(GenerateRow("a")) == "bbf9b7da40eae9ae0b7c49dd2d530dfd"
    assert row_id_of(GenerateRow("a", np.uint64(7), guidance=np.float32(3))) == row_id_of(
        GenerateRow("a", 7, guidance=3)
    )
    with pytest.raises(ValueError, match="digests: got 1, expected one for each of 3 images"):
        row_id_of(FULL, ["1"])


def test_an_image_counts_by_its_content(tmp_path):
    first, second = picture(tmp_path / "1.png"), picture(tmp_path / "2.png")
    row = GenerateRow("a", image=first, conditions=(second,))
    name, taken = identified(row)
    assert taken == row
    assert identified(GenerateRow("a", image=second, conditions=(first,)))[0] == name
    picture(second, 9)
    assert identified(row)[0] != name
    assert identified(GenerateRow("a", image=tmp_path / "3.png"))[0] != identified(GenerateRow("a", image=first))[0]


def test_an_object_is_out_of_its_owners_reach_and_nowhere_to_be_found_again():
    buffer = np.zeros((4, 4, 3), dtype=np.uint8)
    name, taken = identified(GenerateRow("a", conditions=(buffer,)))
    buffer[:] = 255
    assert identified(GenerateRow("a", conditions=(buffer,)))[0] != name
    assert identified(taken)[0] == name
    assert np.asarray(load_image(taken.conditions[0])).max() == 0
    for row in (taken, GenerateRow("a", image=buffer)):
        with pytest.raises(ValueError, match="image: it was given as an object and not as a file"):
            from_columns(columns(row))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("prompt", None, "a text"),
        ("prompt", b"a", "a text"),
        ("seed", -1, "an integer from 0 to 2"),
        ("seed", 2**64, "an integer from 0 to 2"),
        ("seed", 1.0, "an integer from 0 to 2"),
        ("seed", True, "an integer from 0 to 2"),
        ("size", 64, "two positive integers"),
        ("size", (64, 0), "two positive integers"),
        ("size", (64, 64, 3), "two positive integers"),
        ("steps", 0, "a positive integer"),
        ("guidance", float("nan"), "a finite number"),
        ("guidance", "7", "a finite number"),
        ("guidance_rescale", 1.1, "from 0 to 1"),
        ("clip_skip", -1, "from 0"),
        ("strength", 0, "above 0, at most 1"),
        ("image", "a.png", "strings are text"),
        ("conditions", (None,), "strings are text"),
        ("conditions", "a.png", "strings are text"),
        ("adapter", (1,), "names of adapters"),
        ("crop", (-1, 0), "from 0"),
        ("label", 3, "a text"),
        ("cls", -1, "from 0"),
        # The index would not hold them.
        ("cls", 2**31, "from 0, below 2"),
        ("steps", 2**31, "a positive integer below 2"),
        ("size", (8, 2**31), "two positive integers below 2"),
        ("clip_skip", 2**31, "from 0, below 2"),
    ],
)
def test_other_values_are_refused_by_name(field, value, expected):
    with pytest.raises(ValueError, match=rf"{field}: got .*, expected .*{expected}"):
        GenerateRow(**{"prompt": "a", field: value})
