"""Rows from texts, mappings, tables, files of prompts and grids; what is wrong is named by line and column."""

from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dsd_fast.generation.grids import grid, read_classes
from dsd_fast.generation.reading import check_seeds, read_rows, rows_of
from dsd_fast.generation.rows import GenerateRow
from tests.matching.datasets.files import write, write_table

ROWS = [
    {
        "prompt": 'a "red" circle, left', "seed": 2**63 - 1, "negative_prompt": "grey", "height": 64, "width": 96,
        "num_inference_steps": 20, "guidance_scale": 7.5, "guidance_rescale": 0.7, "clip_skip": 1, "image": "é/a.png",
        "strength": 0.5, "conditions": ["b.png", "/abs/c.png"], "adapter": ["one"], "original_size": [512, 640],
        "crops_coords_top_left": [0, 4], "target_size": [64, 96], "class": "circle", "cls": 0, "name": "first",
    },
    {"prompt": "", "seed": 0, "conditions": ["b.png"], "adapter": ["one", "two"], "guidance_scale": 1.0},
    {"prompt": "plain"},
]  # fmt: skip


@pytest.mark.parametrize("container", ["csv", "jsonl", "parquet"])
def test_the_three_containers_say_the_same(container, tmp_path):
    folder = tmp_path / "pictures"
    found = list(read_rows(write_table(tmp_path, container, ROWS), images=folder))
    assert found == [
        GenerateRow(
            'a "red" circle, left', 2**63 - 1, "grey", (64, 96), 20, 7.5, 0.7, 1, folder / "é/a.png", 0.5,
            (folder / "b.png", Path("/abs/c.png")), ("one",), (512, 640), (0, 4), (64, 96), "circle", 0, "first",
        ),
        GenerateRow("", conditions=(folder / "b.png",), adapter=("one", "two"), guidance=1.0),
        GenerateRow("plain"),
    ]  # fmt: skip
    assert list(rows_of(tmp_path / f"table.{container}"))[2] == found[2]


def test_one_name_stands_for_a_list_of_one_and_an_empty_negative_prompt_is_one_but_in_a_csv(tmp_path):
    rows = [{"prompt": "a", "conditions": "b.png", "adapter": "one", "negative_prompt": ""}]
    said = GenerateRow("a", conditions=(tmp_path / "b.png",), adapter=("one",))
    assert list(read_rows(write_table(tmp_path, "csv", rows))) == [said]
    (found,) = read_rows(write_table(tmp_path, "jsonl", rows))
    assert found.negative_prompt == ""


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("prompt,guidence\na,3\n", "line 2, column 'guidence': no row has this; 'guidance' may be meant; expected"),
        ("text\na\n", "line 2, column 'text': no row has this"),
        ("prompt,seed\n,1\nb,x\n", "line 3, column 'seed': got 'x', expected a whole number"),
        ("prompt,seed\na,true\n", "line 2, column 'seed': got 'true', expected a whole number"),
        ("prompt,seed\na,18446744073709551616\n", "line 2, column 'seed': got 18446744073709551616, expected an"),
        ("prompt,seed\na,18014398509481985.0\n", "with all its digits, which floating point has not beyond 2"),
        ("prompt,num_inference_steps\na,0\n", "line 2, column 'num_inference_steps': got 0, expected a positive"),
        ("prompt,guidance\na,high\n", "line 2, column 'guidance': got 'high', expected a number"),
        ("prompt,guidance\na,nan\n", "line 2, column 'guidance': got nan, expected a finite number"),
        ("prompt,guidance,guidance_scale\na,1,1\n", "columns guidance and guidance_scale both say guidance"),
        ("prompt,height\na,64\n", "line 2: got height alone, expected height and width"),
        ("prompt,height,width\na,64,0\n", r"line 2: size: got \(64, 0\), expected"),
        ("prompt,crop\na,5\n", "line 2, column 'crop': got '5', expected a JSON list"),
        ("prompt,crop\na,[5]\n", r"line 2, column 'crop': got \[5\], expected \(top, left\)"),
        ("prompt,image\na,../b.png\n", "column 'image': the image '../b.png' leaves the folder of images"),
        ("prompt,image\na,https://x/b.png\n", "column 'image': the image 'https://x/b.png' is a URL, which is not"),
        ("prompt,conditions\na,data:b\n", "the image 'data:b' is a URL, which is not followed"),
        ("prompt,adapter\na,\"[1]\"\n", "line 2, column 'adapter': got .*, expected one name or a list of names"),
        ("prompt\n", "t.csv has no rows"),
        ("seed\n1\n", "line 2, column 'prompt': the value is missing"),
        ("prompt,seed\na\n", "line 2: got 1 cells, expected 2 as in the header"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_line_and_column(text, wrong, tmp_path):
    with pytest.raises(ValueError, match=wrong):
        list(read_rows(write(tmp_path / "t.csv", text)))


def test_numbers_whose_digits_a_table_has_lost_are_refused(tmp_path):
    # As pandas writes a column of seeds that has a gap.
    rows = [{"prompt": "a", "seed": 3.0}, {"prompt": "b", "seed": 2.0**60}]
    found = read_rows(write_table(tmp_path, "jsonl", rows))
    assert next(found).seed == 3
    with pytest.raises(ValueError, match=r"line 2, column 'seed': got 1\.15.*e\+18, expected a whole number with all"):
        next(found)


@pytest.mark.parametrize("container", ["csv", "jsonl", "parquet"])
def test_the_largest_seed_keeps_its_digits(container, tmp_path):
    seeds = [2**64 - 1, 2**53 + 1, 0]
    file = tmp_path / f"seeds.{container}"
    if container == "parquet":
        pq.write_table(pa.table({"prompt": ["a"] * 3, "seed": pa.array(seeds, pa.uint64())}), file)
    else:
        write_table(tmp_path, container, [{"prompt": "a", "seed": seed} for seed in seeds]).rename(file)
    assert [row.seed for row in read_rows(file)] == seeds


def test_columns_are_left_out_by_name_alone(tmp_path):
    file = write_table(tmp_path, "jsonl", [{"prompt": "a", "url": "http://x", "id": 3}])
    with pytest.raises(ValueError, match="column 'url'"):
        list(read_rows(file))
    assert list(read_rows(file, ignore=["url", "id", "absent"])) == [GenerateRow("a")]


def test_a_table_is_read_as_it_is_asked_for(tmp_path):
    file = write(tmp_path / "t.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"}\nnot JSON\n')
    assert list(islice(read_rows(file), 2)) == [GenerateRow("a"), GenerateRow("b")]
    with pytest.raises(ValueError, match=r"t\.jsonl, line 4: not JSON"):
        list(read_rows(file))


def test_a_file_of_prompts_has_one_a_line(tmp_path):
    file = write(tmp_path / "p.txt", "\ufeff a, b \n\n{not a place}\n")
    prompts = ["a, b", "{not a place}"]
    assert list(read_rows(file, range(3, 5))) == [GenerateRow(prompt, seed) for prompt in prompts for seed in (3, 4)]
    assert list(rows_of(file, range(3, 5))) == list(map(GenerateRow, prompts, (3, 4)))
    for name, wrong in (("p.json", "ends in '.json', expected .txt"), ("q.txt", "is not a file")):
        with pytest.raises(ValueError, match=wrong):
            read_rows(tmp_path / name)


def test_rows_from_python():
    image = Image.new("RGB", (4, 4))
    assert list(rows_of("a")) == [GenerateRow("a")]
    for seed in (7, np.int64(7)):
        assert list(rows_of(["a", "b"], seed)) == [GenerateRow("a", 7), GenerateRow("b", 7)]
    assert list(rows_of(iter(["a", "b"]), np.array([1, 2]))) == [GenerateRow("a", 1), GenerateRow("b", 2)]
    given = {"prompt": "a", "guidance_scale": 3, "height": 8, "width": 16, "image": image, "name": None}
    said = GenerateRow("a", guidance=3.0, size=(8, 16), image=image)
    assert list(rows_of([given, said, {"prompt": "b", "size": [8, 16]}])) == [
        said, said, GenerateRow("b", size=(8, 16)),
    ]  # fmt: skip
    assert list(rows_of({"prompt": "a", "seed": 3})) == [GenerateRow("a", 3)]
    # Any number of rows, of which none is made before it is asked for.
    assert next(rows_of("a", range(2**62))) == GenerateRow("a", 0)


class Frame:
    columns = ("prompt",)

    def __iter__(self):
        return iter(self.columns)


@pytest.mark.parametrize(
    ("prompts", "seeds", "wrong"),
    [
        (5, None, "prompts: got one int"),
        (b"a", None, "prompts: got one bytes"),
        (Frame(), None, "prompts: got one Frame, expected a text, rows"),
        ([["a"]], None, r"prompts\[0\]: got \['a'\], expected a text, a mapping"),
        (["a", {"prompt": "a", "sede": 1}], None, r"prompts\[1\], column 'sede': no row has this; 'seed' may be meant"),
        ([{"seed": 1}], None, r"prompts\[0\], column 'prompt': the value is missing"),
        ([{"prompt": ["a"]}], None, r"prompts\[0\], column 'prompt': got \['a'\], expected a text"),
        ([{"prompt": "a", "image": "b.png"}], None, "column 'image': got 'b.png', expected a pathlib.Path"),
        ([{"prompt": "a", "seed": 1}], 2, r"prompts\[0\] has a seed, and seeds are given too"),
        (GenerateRow("a"), [2], r"prompts\[0\] is a GenerateRow, which has a seed"),
        (["a", "b"], [1], "seeds: got 1 for 2 prompts, expected one each, or one for all"),
        (iter(["a", "b"]), [1], "seeds: got 1 for more prompts, expected one each"),
        (iter(["a", "b"]), range(3), "seeds: got 3 for 2 prompts, expected one each"),
        ({"prompt": "a"}, range(3), "seeds: got 3 for 1 prompts, expected one each"),
        ("a", -1, "seeds: got -1, expected an integer from 0 to"),
        ("a", [1, 2**64], "seeds: got .*, expected an integer from 0 to"),
        ("a", range(-1, 5), r"seeds: got range\(-1, 5\)"),
        ("a", [], "seeds: got none"),
        ("a", range(0), "seeds: got none"),
        ("a", "12", "seeds: got '12'"),
        ("a", {1, 2}, "seeds: got"),
    ],
)
def test_other_requests_are_refused(prompts, seeds, wrong):
    with pytest.raises(ValueError, match=wrong):
        list(rows_of(prompts, seeds))


def test_a_long_range_of_seeds_is_not_written_out():
    assert check_seeds(range(2**63)) == range(2**63)


def test_a_grid(tmp_path):
    classes = write(tmp_path / "classes.txt", "cat\n\n  wild dog\n")
    rows = list(grid(["a {}", "{{{class}}}"], classes, [5, 6]))
    assert rows == [
        GenerateRow(prompt.replace("*", name), seed, label=name, cls=number)
        for number, name in enumerate(["cat", "wild dog"])
        for prompt in ("a *", "{*}")
        for seed in (5, 6)
    ]
    assert next(grid("a {}", ["{x}"])).prompt == "a {x}"


@pytest.mark.parametrize(
    "template", ["a photo", "{} {}", "{name}", "{0}", "{!r}", "{:>9}", "{class} {}", "{", "{class.x}", 5, None]
)
def test_a_template_has_one_place(template):
    with pytest.raises(ValueError, match="templates: got"):
        grid([template], ["cat"])


@pytest.mark.parametrize(
    ("classes", "wrong"),
    [([], "none"), (["a", " "], "' '"), ("cat", "the str 'cat'"), (["a", "b", "a"], "'a' is there more than once")],
)
def test_classes_have_names_of_their_own(classes, wrong):
    with pytest.raises(ValueError, match=f"classes: .*{wrong}"):
        read_classes(classes)
