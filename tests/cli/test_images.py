"""Which files a command finds, under which names, and which prompt each gets."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsd_fast.cli.images import ImageFiles, read_prompts
from dsd_fast.cli.terminal import CommandError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Empty files: what is found does not depend on what is in them."""
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/10.JPG", "b/a.b.webp", "b/notes.txt", "b/deep/1.jpeg", "b/out/x.png", "c.bmp", "1.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("b/linked").symlink_to("deep")
    return tmp_path


def test_files_as_given_and_folders_in_the_order_of_names(tree):
    files = ImageFiles([Path("c.bmp"), Path("b"), Path("missing.png")], without=Path("b/out"))
    found = ["c.bmp", "b/10.JPG", "b/2.png", "b/a.b.webp", "b/deep/1.jpeg", "missing.png"]
    assert [str(path) for path in files] == found
    assert list(files.names) == ["c", "10", "2", "a.b", "deep/1", "missing"]
    assert [str(path) for path in files[1:3]] == found[1:3]
    assert list(files.names[-2:]) == ["deep/1", "missing"]
    assert list(ImageFiles([Path("b/")]).names) == [*files.names[1:5], "out/x"]
    assert list(ImageFiles([tree / "b"], without=tree / "b" / "out").names) == list(files.names[1:5])
    # The folder itself, from inside.
    assert list(ImageFiles([Path()]).names)[:2] == ["1", "b/10"]


def test_a_folder_without_images_is_an_error(tree):
    Path("empty").mkdir()
    with pytest.raises(CommandError, match=r"^empty has no image, expected files that end in \.jpg, "):
        ImageFiles([Path("empty")])


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_prompts_from_tables(tree, ending):
    rows = [
        {"image": "2.png", "prompt": "two"},
        {"image": "deep/1.jpeg", "prompt": ""},
        {"image": "10", "prompt": "ten"},
    ]
    file = Path(f"prompts.{ending}")
    if ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "csv":
        file.write_text("image,prompt\n" + "".join(f"{row['image']},{row['prompt']}\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    files = ImageFiles([Path("b/10.JPG"), Path("b/deep"), Path("b/2.png"), Path("b")], without=Path("b/out"))
    given = {**read_prompts(file), "1": "one", "b/a.b.webp": "whole name"}
    # The path below the folder goes before the stem, which is what is left where the folder is given itself.
    assert files.prompts(given) == ["ten", "one", "two", "ten", "two", "whole name", ""]


def test_prompts_that_do_not_fit(tree):
    files = ImageFiles([Path("b/deep")])
    with pytest.raises(
        CommandError, match=r"none for b/deep/1\.jpeg, expected one under b/deep/1\.jpeg or 1\.jpeg or 1$"
    ):
        files.prompts({"2": "two"})
    for name, text, message in (
        ("p.txt", "", "ends in '.txt', expected one of .csv, .jsonl"),
        ("p.csv", "image,prompt\n", "has no rows, expected the columns image and prompt"),
        (
            "p.jsonl",
            '{"image": "1", "prompt": "a"}\n{"image": "1", "prompt": "b"}\n',
            "line 2: the image '1' has an",
        ),
        ("p.jsonl", '{"image": "1"}\n', "line 1: column 'prompt' is missing"),
        ("p.jsonl", '{"image": "1", "prompt": 3}\n', "line 1, column 'prompt': got 3, expected a text"),
        ("p.jsonl", '{"prompt": "a"}\n', "line 1: column 'image' is missing"),
    ):
        Path(name).write_text(text)
        with pytest.raises((CommandError, ValueError), match=message):
            read_prompts(Path(name))
