"""Plain tables: CSV, JSON lines and Parquet say the same, and what is wrong in them is named by line and column."""

import hashlib
import json
from pathlib import Path

import pytest

import dsd_fast as dsd
from dsd_fast.matching import Group, read_groups
from tests.matching.datasets.files import write, write_csv, write_jsonl, write_parquet, write_table

TEXTS = ['a "red" circle, left', "ein grüner Kreis – 熊 🐻"]


def shown(groups):
    """Without ids."""
    return [(group.images, group.texts, group.label, group.category) for group in groups]


@pytest.mark.parametrize("container", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("given", [True, False])
def test_the_three_containers_say_the_same(container, given, tmp_path):
    rows = [
        {"image": "é/a.png", "texts": [*TEXTS, "a third"], "label": 1, "category": "colour", "id": "one", "more": "x"},
        {"image": "b.png", "texts": TEXTS, "label": 0, "category": "", "id": "two", "more": "x"},
        {"image": "/abs/c.png", "texts": TEXTS, "label": 1, "category": "shape", "id": "three", "more": ""},
    ]
    file = write_table(tmp_path, container, rows)
    assert dsd.read_groups(file, container if given else None) == [
        Group((tmp_path / "é/a.png",), (*TEXTS, "a third"), 1, "colour", "one"),
        Group((tmp_path / "b.png",), tuple(TEXTS), 0, "", "two"),
        Group((Path("/abs/c.png"),), tuple(TEXTS), 1, "shape", "three"),
    ]
    assert read_groups(str(file), images="pictures", limit=2)[0].images == (Path("pictures/é/a.png"),)
    assert len(read_groups(file, limit=2)) == 2
    assert len(read_groups(file, limit=99)) == 3


@pytest.mark.parametrize("container", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("numbered", [True, False])
def test_images_for_a_text_and_pairs(container, numbered, tmp_path):
    def items(name, values):
        return {f"{name}_{i}": value for i, value in enumerate(values)} if numbered else {f"{name}s": values}

    rows = [{**items("image", ["a.png", "b.png", "c.png"]), "text": "x", "label": 2}]
    assert shown(read_groups(write_table(tmp_path, container, rows))) == [
        (tuple(tmp_path / f"{name}.png" for name in "abc"), ("x",), 2, "")
    ]
    rows = [{**items("image", ["a.png", "b.png"]), **items("text", ["x", "y"])}]
    (group,) = read_groups(write_table(tmp_path, container, rows))
    assert group.paired
    assert shown([group]) == [((tmp_path / "a.png", tmp_path / "b.png"), ("x", "y"), 0, "")]


def test_a_row_with_fewer_candidates_leaves_the_last_columns_empty(tmp_path):
    file = write(tmp_path / "t.csv", "image,text_0,text_1,text_2,label\na.png,x,y,z,2\nb.png,x,y,,1\nc.png,x,,z,0\n")
    assert [group.texts for group in read_groups(file, limit=2)] == [("x", "y", "z"), ("x", "y")]
    with pytest.raises(ValueError, match=r"t\.csv, line 4, column 'text_1': the value is missing"):
        read_groups(file)
    rows = [{"image": "a.png", "text_0": "x", "text_1": "y", "text_2": None, "label": 0}]
    assert read_groups(write_parquet(tmp_path / "t.parquet", rows))[0].texts == ("x", "y")


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_quotes_and_a_byte_order_mark(line_end, mark, tmp_path):
    rows = [
        {"image": "a.png", "text_0": "one, two", "text_1": 'he said "no"', "label": "0"},
        {"image": "b.png", "text_0": "two\r\nlines", "text_1": "x\u2028y", "label": " 1 "},
        {"image": "c.png", "text_0": "x", "text_1": "y", "label": "7"},
    ]
    file = write_csv(tmp_path / "t.csv", rows, line_end=line_end, mark=mark)
    groups = read_groups(file, limit=2)
    assert [group.texts for group in groups] == [("one, two", 'he said "no"'), ("two\r\nlines", "x\u2028y")]
    assert [group.label for group in groups] == [0, 1]
    # The second row takes two lines of the file, so the third begins on line 5.
    with pytest.raises(ValueError, match=r"t\.csv, line 5: label: got 7, expected 0 to 1"):
        read_groups(file)
    lines = [
        json.dumps({"image": "a.png", "texts": ["x\u2028y", "z"], "label": 0}, ensure_ascii=False),
        "",
        "  ",
        "[1]",
    ]
    file = write(tmp_path / "t.jsonl", mark + line_end.join(lines).encode())
    assert read_groups(file, limit=1)[0].texts == ("x\u2028y", "z")
    with pytest.raises(ValueError, match=r"t\.jsonl, line 4: got \[1\], expected a JSON object"):
        read_groups(file)


GOOD = {"image": "a.png", "texts": ["x", "y"], "label": 0}


@pytest.mark.parametrize("pair", [(0, 1), (0.0, 1.0), (False, True), ("0", "1"), ("0.0", " 1. "), ("false", "True")])
@pytest.mark.parametrize("container", ["csv", "jsonl", "parquet"])
def test_labels_are_read_as_tables_hold_them(pair, container, tmp_path):
    file = write_table(tmp_path, container, [{**GOOD, "label": label} for label in pair])
    assert [group.label for group in read_groups(file)] == [0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "label": 2}, "line 2: label: got 2, expected 0 to 1"),
        ({**GOOD, "label": -1}, "line 2: label: got -1"),
        ({**GOOD, "label": "yes"}, "line 2, column 'label': got 'yes', expected a whole number"),
        ({**GOOD, "label": "0.5"}, "line 2, column 'label': got '0.5', expected a whole number"),
        ({**GOOD, "label": 0.5}, "line 2, column 'label': got 0.5, expected a whole number"),
        ({**GOOD, "label": float("nan")}, "line 2, column 'label': got nan, expected a whole number"),
        ({**GOOD, "label": float("inf")}, "line 2, column 'label': got inf, expected a whole number"),
        ({**GOOD, "label": [0]}, r"line 2, column 'label': got \[0\], expected a whole number"),
        ({**GOOD, "label": None}, "line 2, column 'label': the value is missing"),
        ({"image": "a.png", "texts": ["x", "y"]}, "line 2: column 'label' is missing; there are image, texts"),
        ({**GOOD, "texts": "xy"}, "line 2, column 'texts': got 'xy', expected a list"),
        ({**GOOD, "texts": ["x", 3]}, "line 2, column 'texts': .* expected texts"),
        ({**GOOD, "texts": ["x", " "]}, "line 2, column 'texts': .* expected texts"),
        ({**GOOD, "texts": ["x", "\ud800"]}, "line 2, column 'texts': .* expected texts"),
        ({**GOOD, "texts": ["x"]}, "line 2: images, texts: got 1 and 1"),
        ({**GOOD, "texts": []}, "line 2: images, texts: got 1 and 0"),
        ({**GOOD, "text": "x"}, "line 2: got both text and texts, expected one of them"),
        ({**GOOD, "image": None}, "line 2: no value in image, images or image_0; its columns are image, texts, label"),
        ({**GOOD, "image": ["a.png"]}, "line 2, column 'image': .* expected an image's file name"),
        ({**GOOD, "image": 3}, "line 2, column 'image': got 3, expected an image's file name"),
        ({**GOOD, "image": "https://example.org/a.png"}, "line 2: the image 'https://example.org/a.png' is a URL"),
        ({**GOOD, "image": "file:///a.png"}, "line 2: the image 'file:///a.png' is a URL, which is not followed"),
        ({**GOOD, "image": "data:image/png;base64,AA"}, "line 2: .* is a URL"),
        ({**GOOD, "image": "../a.png"}, "line 2: the image '../a.png' leaves the folder of images"),
        ({**GOOD, "image": "b/../../a.png"}, "line 2: .* leaves the folder of images"),
        ({**GOOD, "image": "a\0.png"}, "line 2: .* is no file name"),
        ({**GOOD, "id": 1.5}, "line 2, column 'id': got 1.5, expected a text or a whole number"),
        ({**GOOD, "category": ["x"]}, "line 2, column 'category': .* expected a text or a whole number"),
        ({**GOOD, "id": "first"}, "line 2: the id 'first' is also that of .*t.jsonl, line 1"),
    ],
)
def test_a_wrong_row_is_named_by_line_and_column(row, message, tmp_path):
    rows = [{**GOOD, "id": "first"}, row]
    file = write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"t\.jsonl, {message}"):
        read_groups(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.jsonl",
            '{"image": "a", "texts": ["x", "y"], "label": 0}\n\n{"image": ]\n',
            "line 3: not JSON: .*character 11",
        ),
        ("t.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("t.jsonl", '{"label": ' + "1" * 5000 + "}", "line 1: not JSON that can be read"),
        ("t.jsonl", "", " has no rows"),
        ("t.jsonl", "\n\n", " has no rows"),
        ("t.csv", "", " has no rows"),
        ("t.csv", "image,text_0,text_1,label\n", " has no rows"),
        ("t.csv", "image,text_0,text_1,label\n\na,x,y\n", "line 3: got 3 cells, expected 4 as in the header"),
        ("t.csv", "image,text_0,text_1,label\na,x,y,0,1\n", "line 2: got 5 cells, expected 4"),
        ("t.csv", "image,text_0,text_0,label\na,x,y,0\n", "line 1: the header has 'text_0' more than once"),
        ("t.csv", 'image,text_0,text_1,label\na,"x,y,0\n', "line 2: not CSV: "),
        ("t.csv", "image,texts,label\na,x,0\n", "line 2, column 'texts': got 'x', expected a JSON list"),
        ("t.csv", 'image,texts,label\na,"{""x"": 1}",0\n', "line 2, column 'texts': .* expected a JSON list"),
        ("t.csv", "image,text_0,text_1,label\na,x,y,one\n", "line 2, column 'label': got 'one', expected a whole"),
        ("t.csv", "image,text_0,text_1,label\na,x,y,\n", "line 2, column 'label': the value is missing"),
        ("t.csv", "image,text_0,text_1,lable\na,x,y,0\n", "line 2: column 'label' is missing; there are image, text_0"),
        ("t.csv", b"image,text_0,text_1,label\na,\xff,y,0\n", " is not UTF-8 text: it has the byte 0xff"),
        ("t.parquet", b"", " is not a Parquet file"),
        ("t.parquet", b"PAR1 and more", " is not a Parquet file"),
    ],
)
def test_a_wrong_file_is_named(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=rf"{name.replace('.', '[.]')},? ?{message.lstrip()}"):
        read_groups(write(tmp_path / name, content))


def test_a_wrong_parquet_row_is_named(tmp_path):
    file = write_parquet(tmp_path / "t.parquet", [GOOD] * 70 + [{**GOOD, "label": 5}])
    with pytest.raises(ValueError, match=r"t\.parquet, row 71: label: got 5"):
        read_groups(file)
    with pytest.raises(ValueError, match=r"t\.parquet, row 1, column 'label': got 'first', expected a whole number"):
        read_groups(write_parquet(tmp_path / "t.parquet", [{**GOOD, "label": "first"}]))


def test_order_count_and_ids(tmp_path):
    rows = [{"image": f"{i}.png", "texts": [f"text {i}", "none"], "label": i % 2} for i in range(300)]
    for container in ("csv", "jsonl", "parquet"):
        groups = read_groups(write_table(tmp_path, container, rows))
        assert [group.texts[0] for group in groups] == [f"text {i}" for i in range(300)]
        ids = [group.id for group in groups]
        assert len(set(ids)) == 300
        assert all(len(identity) == 16 and int(identity, 16) >= 0 for identity in ids)
        # Neither order, folder nor container changes an id.
        again = read_groups(write_table(tmp_path, container, rows[::-1]), images="/elsewhere")
        assert [group.id for group in again] == ids[::-1]
        assert ids == [group.id for group in read_groups(write_table(tmp_path, "jsonl", rows))]


def test_the_id_is_the_digest_of_images_texts_and_label(tmp_path):
    def identity(**changes):
        return read_groups(write_jsonl(tmp_path / "t.jsonl", [{**GOOD, **changes}]))[0].id

    assert identity() == hashlib.sha256(b'[["a.png"], ["x", "y"], 0]').hexdigest()[:16]
    assert identity(category="c") == identity()
    assert len({identity(), identity(image="b.png"), identity(texts=["x", "z"]), identity(label=1)}) == 4
    assert identity(id="given") == "given"
    assert identity(id=7) == "7"


def test_equal_groups_are_told_apart(tmp_path):
    groups = read_groups(write_jsonl(tmp_path / "t.jsonl", [GOOD, {**GOOD, "label": 1}, GOOD, GOOD]))
    first = groups[0].id
    assert [group.id for group in groups] == [first, groups[1].id, f"{first}-2", f"{first}-3"]
    assert groups[1].id != first


def test_files_are_looked_at_on_request_only(tmp_path):
    rows = [{**GOOD, "image": f"{name}.png"} for name in "abc"]
    file = write_jsonl(tmp_path / "t.jsonl", rows)
    (tmp_path / "a.png").touch()
    assert len(read_groups(file)) == 3
    with pytest.raises(ValueError, match=r"2 images are not files, the first: .*t\.jsonl, line 2: .*b\.png"):
        read_groups(file, check=True)
    assert len(read_groups(file, check=True, limit=1)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "json"}, "format: got 'json', expected one of comvg, vqa, vqa-binary, refcocog, winoground, jsonl"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": True}, "seed: got True"),
        ({"limit": 0}, "limit: got 0, expected an integer of at least 1"),
        ({"image_name": "{}.jpg"}, "image_name: got '{}.jpg', but jsonl files name their images themselves"),
        ({"format": "comvg", "image_name": "x.jpg"}, "image_name: got 'x.jpg', expected a template"),
        ({"format": "comvg", "image_name": "{x}.jpg"}, "image_name: got '{x}.jpg', expected a template"),
        ({"format": "csv"}, "t.jsonl has no rows"),
        ({"format": "parquet"}, "is not a Parquet file"),
        ({"format": "refcocog"}, "t.jsonl"),
        ({"format": "comvg"}, "line 1: column 'pos_image_id' is missing; there are image, texts, label"),
    ],
)
def test_wrong_arguments(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_groups(write_jsonl(tmp_path / "t.jsonl", [GOOD]), **options)


def test_what_is_no_known_file_says_what_was_recognised(tmp_path):
    with pytest.raises(ValueError, match=r"format: .* is a csv table with the columns a, b, none of comvg .sentence"):
        read_groups(write(tmp_path / "t.csv", "a,b\n1,2\n"))
    with pytest.raises(ValueError, match=r"format: not told by the ending '.dat'"):
        read_groups(write(tmp_path / "t.dat", "a,b\n1,2\n"))
    with pytest.raises(ValueError, match=r"format: .* is JSON and begins with {'a': 1}"):
        read_groups(write(tmp_path / "t.json", '[{"a": 1}]'))
    with pytest.raises(ValueError, match=r"t\.json, line 2: not JSON"):
        read_groups(write(tmp_path / "t.json", "[\n,]"))
    with pytest.raises(ValueError, match=r"ends in '.dat', expected one of .csv"):
        read_groups(write(tmp_path / "t.dat", "a,b\n1,2\n"), "comvg")
    with pytest.raises(ValueError, match=r"source: .*none.csv is not a file"):
        read_groups(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"is a folder without refs.google..json"):
        read_groups(tmp_path)
    with pytest.raises(ValueError, match=r"is not a file"):
        read_groups(tmp_path, "csv")
