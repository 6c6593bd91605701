"""The official layouts: ComVG, VQA and Winoground as tables, yes-or-no statements, and the official parts."""

from pathlib import Path

import pytest

from dsd_fast.matching import Group, official_split, read_groups
from tests.matching.datasets.files import BINARY, write, write_csv, write_json, write_jsonl, write_table

COMVG = {
    "id": "12",
    "sentence": "a man is sitting at a table",
    "pos_triplet": "man,sit,table",
    "neg_triplet": "('dog', 'sit', 'table')",
    "pos_image_id": "2358258",
    "neg_image_id": "180",
    "neg_value": "subject",
}
VQA = {"sentence": "Which? la", "pos_image_id": "108327", **{f"neg_sentence_{i}": f"Which? {i}" for i in range(1, 10)}}
WINOGROUND = {
    "id": 0,
    "image_0": "ex_0_img_0",
    "image_1": "ex_0_img_1",
    "caption_0": "an old person kisses a young person",
    "caption_1": "a young person kisses an old person",
    "tag": "Adjective-Age",
    "secondary_tag": "",
    "num_main_preds": 1,
    "collapsed_tag": "Object",
}


@pytest.mark.parametrize("format", [None, "comvg"])
def test_comvg(format, tmp_path):
    rows = [COMVG, {**COMVG, "id": "13", "neg_value": "verb"}, {**COMVG, "id": "14", "neg_value": "object"}]
    groups = read_groups(write_csv(tmp_path / "compositional_visual_genome.csv", rows), format, images="vg")
    assert groups[0] == Group(
        (Path("vg/2358258.jpg"), Path("vg/180.jpg")), ("a man is sitting at a table",), 0, "subject", "12"
    )
    assert [(group.id, group.category) for group in groups] == [("12", "subject"), ("13", "verb"), ("14", "object")]


def test_comvg_training_file_needs_three_columns(tmp_path):
    rows = [{key: COMVG[key] for key in ("sentence", "pos_image_id", "neg_image_id")}]
    (group,) = read_groups(write_csv(tmp_path / "comvg_train.csv", rows), image_name="VG_100K/{}.png")
    assert group.images == (tmp_path / "VG_100K/2358258.png", tmp_path / "VG_100K/180.png")
    assert (group.category, len(group.id)) == ("", 16)
    # The same rows say the same in another container, with the ids as numbers.
    rows = [{**rows[0], "pos_image_id": 2358258, "neg_image_id": 180}]
    assert read_groups(write_table(tmp_path, "parquet", rows))[0].images[1] == tmp_path / "180.jpg"


@pytest.mark.parametrize("format", [None, "vqa"])
@pytest.mark.parametrize(("name", "folder"), [("vqa_text_test", "val2014"), ("vqa_text_train", "train2014")])
def test_vqa(format, name, folder, tmp_path):
    (group,) = read_groups(write_csv(tmp_path / f"{name}.csv", [VQA]), format)
    assert group.images == (tmp_path / f"COCO_{folder}_000000108327.jpg",)
    assert group.texts == ("Which? la", *(f"Which? {i}" for i in range(1, 10)))
    assert (group.label, group.category) == (0, "")


@pytest.mark.parametrize("container", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("given", [True, False])
def test_winoground(container, given, tmp_path):
    rows = [WINOGROUND, {**WINOGROUND, "id": 1, "collapsed_tag": "", "image_0": "other.jpg"}]
    groups = read_groups(write_table(tmp_path, container, rows), "winoground" if given else None, images="images")
    assert groups[0] == Group(
        (Path("images/ex_0_img_0.png"), Path("images/ex_0_img_1.png")),
        ("an old person kisses a young person", "a young person kisses an old person"),
        0,
        "Object",
        "0",
    )
    assert groups[0].paired
    # Without the collapsed tag its finer one; a name with an ending keeps it.
    assert (groups[1].category, groups[1].images[0]) == ("Adjective-Age", Path("images/other.jpg"))
    file = write_table(tmp_path, container, rows[:1])
    assert read_groups(file, image_name="small/{}.jpg")[0].images[0] == tmp_path / "small/ex_0_img_0.jpg"


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        ({**COMVG, "neg_image_id": ""}, None, "line 2, column 'neg_image_id': the value is missing"),
        ({**COMVG, "sentence": " "}, None, "line 2, column 'sentence': got ' ', expected a text"),
        ({**COMVG, "pos_image_id": "../1"}, None, "line 2: the image '../1.jpg' leaves the folder"),
        (
            {"sentence": "x", "pos_image_id": "1"},
            "comvg",
            "line 2: column 'neg_image_id' is missing; there are sentence",
        ),
        ({**VQA, "pos_image_id": "x"}, None, "line 2: the image id 'x' does not fit the file name 'COCO_val2014_"),
        ({**VQA, "neg_sentence_9": ""}, None, "line 2, column 'neg_sentence_9': the value is missing"),
        ({"sentence": "x", "pos_image_id": "1"}, "vqa", "line 2: column 'neg_sentence_1' is missing"),
        ({**WINOGROUND, "caption_1": ""}, None, "line 2, column 'caption_1': the value is missing"),
    ],
)
def test_a_wrong_row_of_an_official_table(row, format, message, tmp_path):
    with pytest.raises(ValueError, match=rf"t\.csv, {message}"):
        read_groups(write_csv(tmp_path / "t.csv", [row]), format)


def statements(count, kind=BINARY):
    """Lines with an image and a statement each; two share their image."""
    return [f"COCO_{max(i, 1):03d}.jpg*{kind}is it {i}? it is {i}: yes" for i in range(count)]


def test_vqa_binary(tmp_path):
    others = [
        "OTHER.jpg*The question is asking about others: what color? red.",
        "NUMBER.jpg*The question is asking about numbers: how many? two",
        "",
    ]
    lines = statements(40)
    file = write(tmp_path / "test.txt", "\r\n".join([*lines[:20], *others, *lines[20:]]))
    groups = read_groups(file)
    assert groups == read_groups(file, "vqa-binary")
    # The text after the first colon alone, the line's image first, nine different others of statements of this kind.
    assert [group.texts for group in groups] == [(f"is it {i}? it is {i}: yes",) for i in range(40)]
    assert [group.images[0].name for group in groups] == [f"COCO_{max(i, 1):03d}.jpg" for i in range(40)]
    known = {tmp_path / f"COCO_{i:03d}.jpg" for i in range(1, 40)}
    assert all(len(set(group.images)) == 10 and set(group.images) <= known for group in groups)
    assert {group.label for group in groups} == {0}
    # Every other image is drawn somewhere, and the seed chooses.
    assert set().union(*(group.images[1:] for group in groups)) == known
    assert [group.images for group in read_groups(file, seed=1)] != [group.images for group in groups]
    assert read_groups(file, limit=3) == groups[:3]


def test_the_order_of_the_lines_does_not_change_the_groups(tmp_path):
    lines = statements(30)
    groups = read_groups(write(tmp_path / "test.txt", "\n".join(lines)))
    assert read_groups(write(tmp_path / "test.txt", "\n".join(lines[::-1]))) == groups[::-1]


def test_saved_negatives_of_the_official_code(tmp_path):
    saved = [["a.jpg", [f"{i}.jpg" for i in range(9)], "is it? yes"], ["b.jpg", ["0.jpg"] * 9, "is it? no"]]
    groups = read_groups(write_json(tmp_path / "test3_neg_samples.json", saved), images="val2014")
    assert groups[0].images == (Path("val2014/a.jpg"), *(Path(f"val2014/{i}.jpg") for i in range(9)))
    # An image may be there twice: the official file is taken as it is.
    assert (groups[1].images[1:], groups[1].texts) == ((Path("val2014/0.jpg"),) * 9, ("is it? no",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", "a.jpg " + BINARY + "x", r"t\.txt, line 1: got 'a\.jpg The.*, expected '<image>\*The question"),
        ("t.txt", "\n\na.jpg*" + BINARY + "x*y", r"t\.txt, line 3: got "),
        ("t.txt", "*" + BINARY + "x", r"t\.txt, line 1: got "),
        ("t.txt", "a.jpg*The question is asking about yes or no:", r"t\.txt, line 1: no text follows"),
        ("t.txt", "a.jpg*" + BINARY.strip() + "  \n", r"t\.txt, line 1: no text follows"),
        ("t.txt", "", r"t\.txt has no line with 'The question is asking about yes or no'"),
        ("t.txt", "a.jpg*The question is asking about others: x? y", r"t\.txt has no line with"),
        # One of the ten lines shares its image with another: eight others are left for these two.
        ("t.txt", "\n".join(statements(10)), r"t\.txt, line 1: the file has 8 other images to draw from, expected 9"),
        ("t.json", '[["a", [], "x"]]', r"t\.json, item 1: got .*expected \[image, \[9 images\], text\]"),
        ("t.json", '[["a", ["1","2","3","4","5","6","7","8",9], "x"]]', r"t\.json, item 1: an image or the text is no"),
    ],
)
def test_a_wrong_list_of_statements(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_groups(write(tmp_path / name, content), "vqa-binary")


def made(count):
    return [Group((Path(f"{i}.jpg"),), ("x", "y"), id=str(i)) for i in range(count)]


def test_official_parts():
    for count in (20, 39, 40, 1000, 5400):
        groups = made(count)
        # What the official code computes, in floating point: 5 % of the pairs, then whole groups of ten of them.
        pairs = int(0.05 * (count * 10))
        expected = (pairs - pairs % 10) // 10
        train = official_split(groups, "refcocog", "train")
        assert train == groups[:expected]
        assert official_split(groups, "refcocog", "evaluation") == groups[expected:]
        for format in ("comvg", "vqa"):
            assert official_split(groups, format, "train") == groups[: int(count * 0.05)]
            assert official_split(groups, format, "evaluation") == groups
    for format in ("vqa-binary", "winoground"):
        assert official_split(made(3), format, "evaluation") == made(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((30, "csv", "train"), "format: got 'csv', which has no official split; expected 'refcocog'"),
        ((30, "refcocog", "val"), "part: got 'val', expected 'train' or 'evaluation'"),
        ((30, "vqa-binary", "train"), "part: vqa-binary has no training part"),
        ((30, "winoground", "train"), "part: winoground has no training part"),
        ((19, "comvg", "train"), "groups: got 19, of which 5 % are none; expected 20 or more"),
    ],
)
def test_parts_that_do_not_exist(arguments, message):
    count, format, part = arguments
    with pytest.raises(ValueError, match=message):
        official_split(made(count), format, part)


def test_the_ids_of_a_file_win_and_its_other_columns_are_left_out(tmp_path):
    rows = [{**WINOGROUND, "id": "w", "label": 5}]
    (group,) = read_groups(write_jsonl(tmp_path / "t.jsonl", rows))
    assert (group.id, group.label) == ("w", 0)
