"""The data card: what the hub reads of it, and its own examples."""

import re
import runpy
import shutil

import pytest
import yaml

from dsd_fast.generation.card import card
from dsd_fast.generation.closing import close
from dsd_fast.generation.files import LAYOUTS
from tests.generation.pictures import BAD, COUNT, run

COUNTS = {"images": 0, "rows": 0, "errors": {}, "rejected": {}, "classes": [], "near_duplicates": None, "shards": []}
SETTINGS = {"layout": "webdataset", "format": "png", "model": "a|model"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_examples_run_and_the_hub_finds_the_images(tmp_path, monkeypatch, capsys, layout):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("webdataset")
    folder = tmp_path / "set"
    run(folder, layout, format="webp" if layout == "webdataset" else "png")
    close(folder)
    text = (folder / "dataset_card.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(examples) == 3
    monkeypatch.chdir(folder)
    for number, example in enumerate(examples):
        file = tmp_path / f"example{number}.py"
        file.write_text(example)
        runpy.run_path(str(file))
    assert capsys.readouterr().out.count("(40, 24)") == 2
    shutil.copyfile(folder / "dataset_card.md", folder / "README.md")
    found = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(found) == COUNT - len(BAD)
    assert found[0]["webp" if layout == "webdataset" else "image"].size == (40, 24)
    # Only later rows have one.
    said = found.features["json"] if layout == "webdataset" else found.features
    assert ("negative_prompt" in said) == (layout != "webdataset")
    assert ("leaves out" in text) == (layout != "parquet")


def test_it_says_what_is_in_the_folder(tmp_path):
    run(tmp_path)
    close(tmp_path)
    text = (tmp_path / "dataset_card.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["task_categories"] == ["text-to-image", "image-classification"]
    assert header["size_categories"] == ["n<1K"]
    for line in (
        "| images | 9 |", "| no image: not-accepted | 2 |", "| tries rejected: near-duplicate | 2 |",
        "| near-duplicates of another image of their class (near_duplicates.parquet) | 2 |",
        '| 1 | ../"tree" frog \\| [a]*? | 2 | 1 |',
        "All 9 images are synthetic", "trainedAlgorithmicMedia", "No safety checker ran.",
        '"model": "a <model> & its \\u0000name"',
    ):  # fmt: skip
        assert line in text
    run(tmp_path / "plain", mark=False)
    close(tmp_path / "plain")
    assert "The images carry no mark that says so." in (tmp_path / "plain" / "dataset_card.md").read_text()


@pytest.mark.parametrize(
    ("images", "size"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**8, "100M<n<1B"), (10**9, "1B<n<10B")],
)
def test_size_categories(images, size):
    text = card(SETTINGS, COUNTS | {"images": images, "shards": ["00000.tar"]})
    assert yaml.safe_load(text.split("---\n")[1])["size_categories"] == [size]


def test_of_many_classes_the_smallest_are_shown():
    classes = [{"cls": cls, "label": f"class {cls}", "images": 1000 - cls, "errors": 0} for cls in range(1000)]
    text = card(SETTINGS, COUNTS | {"classes": classes})
    assert "1000 classes, of which the smallest has 1 images, the largest 1000, the middle one 501." in text
    assert text.count("| class ") == 50 + 1
    assert "| 999 | class 999 | 1 | 0 |" in text
