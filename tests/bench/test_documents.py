"""Tables, CSV files and figures follow the records, and a stale one is named."""

from pathlib import Path

import pytest

from dsd_fast.bench.documents import FIGURES, RESULTS, update
from dsd_fast.bench.records import append
from dsd_fast.bench.suites import SUITES
from tests.bench.samples import quality, speed
from tests.bench.tiny_suite import suite
from tests.repository.source import ROOT

TINY = {"tiny": suite}

README = """# Tiny

<!-- bench:tiny/product -->
old
<!-- /bench:tiny/product -->

Text that stays.

<!-- bench:tiny/empty -->
<!-- /bench:tiny/empty -->
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs/shares.md").write_text("<!-- bench:tiny/share -->\n<!-- /bench:tiny/share -->\n")
    return tmp_path


def record(root, *made):
    for each in made:
        append(root / RESULTS / "tiny.jsonl", each)


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_repositorys_documents_are_what_its_records_say():
    assert update(ROOT, SUITES, check=True) == []


def test_documents_are_made_once_and_then_left(root):
    record(root, speed(), quality())
    made = update(root, TINY, check=False)
    figures = [FIGURES / "tiny-product.svg", FIGURES / "tiny-share.svg"]
    assert sorted(made) == sorted([Path("README.md"), Path("docs/shares.md"), RESULTS / "tiny.csv", *figures])
    before = files(root)
    assert update(root, TINY, check=False) == update(root, TINY, check=True) == []
    assert files(root) == before

    readme = (root / "README.md").read_text()
    assert "| product/8: at once |" in readme
    assert "old" not in readme
    assert "Text that stays." in readme
    assert "![Products of matrices](docs/figures/tiny-product.svg)" in readme
    assert "<!-- bench:tiny/empty -->\nNothing yet: not measured yet; `dsd-fast bench tiny` does it." in readme
    assert "![Shares](figures/tiny-share.svg)" in (root / "docs/shares.md").read_text()


def test_check_writes_nothing_and_names_what_is_stale(root):
    record(root, speed())
    before = files(root)
    names = [RESULTS / "tiny.csv", Path("README.md"), Path("docs/shares.md"), FIGURES / "tiny-product.svg"]
    assert update(root, TINY, check=True) == names
    assert files(root) == before


@pytest.mark.parametrize("name", ["README.md", "docs/shares.md", str(RESULTS / "tiny.csv")])
def test_one_changed_byte_makes_a_file_stale(root, name):
    record(root, speed(), quality())
    update(root, TINY, check=False)
    content = (root / name).read_bytes()
    place = content.index(b"0.1.0")
    (root / name).write_bytes(content[:place] + b"9" + content[place + 1 :])
    assert update(root, TINY, check=True) == [Path(name)]
    assert update(root, TINY, check=False) == [Path(name)]
    assert (root / name).read_bytes() == content


def test_a_figure_is_stale_when_its_numbers_are_not_when_its_bytes_are(root):
    record(root, speed())
    update(root, TINY, check=False)
    figure = root / FIGURES / "tiny-product.svg"
    # Another version of matplotlib draws other bytes.
    figure.write_bytes(figure.read_bytes().replace(b"<svg ", b"<svg  "))
    assert update(root, TINY, check=True) == []
    figure.write_bytes(figure.read_bytes().replace(b"31.25", b"31.35"))
    assert update(root, TINY, check=True) == [FIGURES / "tiny-product.svg"]
    figure.unlink()
    assert update(root, TINY, check=True) == [FIGURES / "tiny-product.svg"]


def test_a_new_record_makes_all_stale_that_show_it(root):
    record(root, speed(), quality())
    update(root, TINY, check=False)
    record(root, speed(subject=speed()["subject"] | {"median": 0.125}))
    names = [RESULTS / "tiny.csv", Path("README.md"), FIGURES / "tiny-product.svg"]
    assert update(root, TINY, check=True) == names


def test_without_records_there_is_no_csv_and_no_figure(root):
    record(root, speed())
    update(root, TINY, check=False)
    (root / RESULTS / "tiny.jsonl").unlink()
    gone = [RESULTS / "tiny.csv", FIGURES / "tiny-product.svg"]
    assert update(root, TINY, check=False) == [gone[0], Path("README.md"), gone[1]]
    assert not any((root / file).exists() for file in gone)
    assert "Products of matrices: not measured yet" in (root / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "<!-- bench:tiny/no -->\n<!-- /bench:tiny/no -->\n",
            "the marker bench:tiny/no names nothing; there are tiny/",
        ),
        ("<!-- bench:tiny/share -->\n", "its bench markers do not come in pairs"),
        ("<!-- /bench:tiny/share -->\n", "its bench markers do not come in pairs"),
        (
            "<!-- bench:tiny/share -->\n<!-- /bench:tiny/product -->\n",
            "the marker bench:tiny/share is closed by /bench:tiny/product",
        ),
    ],
)
def test_a_wrong_marker_is_named_and_nothing_is_written(root, text, reason):
    record(root, speed())
    (root / "docs/wrong.md").write_text(text)
    before = files(root)
    with pytest.raises(ValueError, match=f"^docs/wrong.md: {reason}"):
        update(root, TINY, check=False)
    assert files(root) == before


def test_a_bad_record_is_named(root):
    record(root, speed())
    with (root / RESULTS / "tiny.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"tiny\.jsonl, line 2: schema is None"):
        update(root, TINY, check=True)
