"""The numbers that plots show, and that the files carry them."""

import subprocess
import sys

import pytest

from dsd_fast.bench.plots import data_of, plot_data, svg
from tests.bench.samples import grown, quality, speed
from tests.bench.tiny_suite import GROWTH, suite

SUITE = suite()
GROUPS = {group.name: group for group in SUITE.groups}


def sides(case, rows, median):
    """A record of `rows` rows."""
    made = speed(case, items=rows)
    for side, factor in (("subject", 1), ("baseline", 4)):
        made[side] |= {"sizes": {"rows": rows}, "median": factor * median, "p20": median / 2, "p80": 8 * median}
    return made


def rung(name, median, ratio):
    """A record of a rung."""
    side = speed()["subject"] | {"name": name, "median": median}
    return speed(f"ladder, {name}", ratio, ratio, ratio, group="ladder", subject=side)


RECORDS = {
    "product": [sides("product/8", 8, 0.8), sides("product/4", 4, 0.2)],
    "ladder": [rung("half", 0.5, 2.0), rung("whole", 0.1, 5.0)],
    "share": [
        quality("share, size = 2", 0.9, 0.8, 0.95, sizes={"size": 2}, seconds=0.02),
        quality(seconds=0.01),
        quality("other, size = 1", seconds=None, case="share"),
    ],
}


def panels(name):
    return plot_data(SUITE, GROUPS[name], RECORDS[name])["panels"]


def test_latency_is_milliseconds_per_item_by_size():
    (panel,) = panels("product")
    assert panel["machine"] == "Processor, 2 threads"
    assert (panel["x"], panel["y"]) == ("rows", "ms per row")
    assert panel["lines"] == {
        "at once": [[4, 50.0, 25.0, 400.0], [8, 100.0, 50.0, 800.0]],
        "one by one": [[4, 200.0, 25.0, 400.0], [8, 400.0, 50.0, 800.0]],
    }


def test_a_baseline_of_several_sides_is_one_point():
    other = sides("product/8", 8, 0.8) | {"name": "product/8, other"}
    (panel,) = plot_data(SUITE, GROUPS["product"], [sides("product/8", 8, 0.8), other])["panels"]
    assert panel["lines"]["one by one"] == [[8, 400.0, 50.0, 800.0]]


def test_waterfall_starts_with_the_baseline_of_the_first_rung():
    (panel,) = panels("ladder")
    assert panel == {
        "machine": "Processor, 2 threads",
        "x": "seconds for 8 rows",
        "bars": [["one by one", 1.0, None], ["half", 0.5, 2.0], ["whole", 0.1, 5.0]],
    }


def test_quality_is_a_line_by_name_against_cost():
    (panel,) = panels("share")
    assert panel["lines"] == {"share": [[10.0, 0.8, 0.7, 0.9, 1], [20.0, 0.9, 0.8, 0.95, 2]]}
    assert (panel["x"], panel["y"], panel["label"], panel["chance"]) == ("ms per pair", "share", "size", 0.5)


def test_growth_is_a_line_by_name_against_a_size_and_levels():
    data = plot_data(GROWTH, GROWTH.groups[0], grown())
    assert data["panels"] == [
        {
            "machine": "Processor, 2 threads",
            "x": "size",
            "y": "share",
            "chance": 0.5,
            "lines": {"first": [[2, 0.8, 0.7, 0.9], [4, 0.5, 0.4, 0.6]], "second, by half": [[2, 0.9, 0.8, 1.0]]},
            "levels": {"before": [0.3, 0.2, 0.4]},
        }
    ]
    content = svg(data)
    assert data_of(content) == data
    assert svg(data) == content


def test_each_machine_has_a_panel():
    other = speed()["machine"] | {"name": "GPU", "kind": "cuda", "threads": 1}
    data = plot_data(SUITE, GROUPS["product"], [*RECORDS["product"], RECORDS["product"][0] | {"machine": other}])
    assert [panel["machine"] for panel in data["panels"]] == ["Processor, 2 threads", "GPU, 1 thread"]
    assert svg(data).count(b'id="axes_') == 2


def test_nothing_to_plot():
    assert plot_data(SUITE, GROUPS["empty"], RECORDS["product"]) is None
    assert plot_data(SUITE, GROUPS["product"], []) is None


@pytest.mark.parametrize("name", RECORDS)
def test_the_file_carries_its_numbers_and_is_the_same_each_time(name):
    data = plot_data(SUITE, GROUPS[name], RECORDS[name])
    content = svg(data)
    assert data_of(content) == data
    assert svg(data) == content
    text = content.decode()
    assert "<dc:date>" not in text
    assert "Matplotlib" not in text


def test_bytes_are_the_same_in_another_process():
    code = (
        "import sys; from dsd_fast.bench.plots import plot_data, svg; from tests.bench.test_plots import *;"
        "sys.stdout.buffer.write(svg(plot_data(SUITE, GROUPS['share'], RECORDS['share'])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == svg(plot_data(SUITE, GROUPS["share"], RECORDS["share"]))


@pytest.mark.parametrize("content", [b"", b"<svg/>", b"<svg", b"<svg><desc>{}</desc></svg>"])
def test_a_file_of_another_kind_has_no_numbers(content):
    assert data_of(content) is None


def test_a_missing_matplotlib_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'dsd-fast\[bench\]'"):
        svg(plot_data(SUITE, GROUPS["product"], RECORDS["product"]))
