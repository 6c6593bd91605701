import json
import re
import sys

import pytest
from typer.testing import CliRunner

from dsd_fast.cli.app import app
from tests.class_tokens.zsl.scenes import CLASSES, draw

TOML = """
out = "made"
images = "scenes"
unseen = ["cyan_square", "green_cross", "red_circle"]
validation = 0
classifiers = ["gaussian"]
baselines = ["plain"]
per_class = 1
counts = [1]
cdm = {widths = [16], steps = 4}
tokens = {images = 1, updates = 1, steps = 1, guidance = 1.0, scheduler = "ddim"}
generate = {steps = 1, guidance = 1.0, scheduler = "ddim"}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    draw(tmp_path / "scenes")
    (tmp_path / "run.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def zsl(*arguments):
    return CliRunner().invoke(app, ["zsl", *arguments])


def test_writes_figures_and_a_page(folder):
    (folder / "scenes" / "red_circle" / "broken.png").write_bytes(b"no image")
    # An unseen class's image lies among a seen one's, too; with so many that some are training images.
    content = (folder / "scenes/red_circle/0.png").read_bytes()
    for name in ("again", "and again"):
        (folder / f"scenes/blue_circle/{name}.png").write_bytes(content)
    found = zsl("run.toml", "--out", "other")
    # An image could not be used.
    assert found.exit_code == 1, found.output
    assert not (folder / "made").exists()
    results = json.loads((folder / "other/results.json").read_bytes())
    page = (folder / "other/report.html").read_text()
    for row in results["table"]:
        assert f"{row['h']:.3f}" in page
        assert f"{row['h']:.3f}" in found.output
    assert "CLIP and Stable Diffusion have been trained" in page
    assert "broken.png" in page
    assert "red_circle/0.png" in results["data"]["test_images_learned_from"]
    assert "test images, " in page
    assert "training images" in found.output
    assert all(name in page for name in CLASSES if name in results["data"]["unseen"])
    # A picture of each class, and a mark for each token and name.
    assert page.count("<img ") == 3
    assert page.count("<circle ") == len(results["tsne"]) == 2 * 3
    assert "<script" not in page
    # Again, with nothing left to do but the figures.
    assert zsl("run.toml", "--out", "other").exit_code == 1
    assert json.loads((folder / "other/results.json").read_bytes()) == results


def test_refuses_in_one_sentence(folder, monkeypatch):
    (folder / "run.toml").write_text(TOML.replace("per_class = 1", "per_clas = 1"))
    found = zsl("run.toml")
    assert (found.exit_code, found.stderr.count("Error")) == (2, 1)
    assert re.search("per_clas: there is no such setting; 'per_class' may be meant", " ".join(found.stderr.split()))
    assert zsl("missing.toml").exit_code == 2
    (folder / "run.toml").write_text(TOML)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    found = zsl("run.toml")
    assert (found.exit_code, "pip install 'dsd-fast[zsl]'" in " ".join(found.stderr.split())) == (2, True)
    assert not (folder / "made").exists()
