"""What the tables say, and that the CSV loses nothing."""

import csv
import io
import json
from dataclasses import replace

import pytest

from dsd_fast.bench import Case, Group, Suite
from dsd_fast.bench.records import flat
from dsd_fast.bench.tables import (
    chosen,
    csv_text,
    duration,
    markdown,
    megabytes,
    plain,
    provenance,
    quality_row,
    rich_tables,
    speed_row,
    targets,
)
from tests.bench.samples import grown, quality, refused, speed
from tests.bench.tiny_suite import GROWTH, suite

SUITE = suite()
GROUPS = {group.name: group for group in SUITE.groups}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.345, "12.3 s"), (1.0, "1 s"), (0.9994, "999 ms"), (0.9996, "1 s"), (0.00123, "1.23 ms"), (4.56e-5, "45.6 µs")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_megabytes():
    assert (megabytes(1_234_567_890), megabytes(0), megabytes(None)) == ("1,235 MB", "0 MB", "-")


def test_markdown_of_speeds():
    text = markdown(SUITE, GROUPS["product"], [speed()])
    head, blank, *table = text.splitlines()
    assert head == (
        "Products of matrices. Processor, 2 CPU threads; python 3.11.0, torch 2.13.0, diffusers 0.42.1, "
        "dsd_fast 0.1.0, mini 01234567; commit 012345678; 2026-01-02."
    )
    assert blank == ""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    assert dict(zip(rows[0], rows[2], strict=True)) == {
        "what": "product/8: at once",
        "time": "250 ms (200 ms to 500 ms)",
        "per item": "31.2 ms per row",
        "against": "one by one",
        "its time": "1 s (800 ms to 1.5 s)",
        "times faster (95 %)": "4.00 (3.50 to 4.50)",
        "accuracy": "largest difference 1.0e-06, limit 1e-05 (one by one)",
        "memory, its memory": "2 MB, 2 MB",
        "of matmul peak": "50%",
        "command": "`dsd-fast bench tiny --only product/8`",
    }


TARGETS = {
    "ratio": {"least": 2.0, "value": 4.0, "met": True},
    "copy_share": {"least": 0.7, "value": 0.25, "met": False},
}


def test_targets_and_bandwidth_have_a_column_where_a_record_has_them():
    bare, full = speed("product/4"), speed(targets=TARGETS, subject=speed()["subject"] | {"copy_share": 0.25})
    text = markdown(SUITE, GROUPS["product"], [bare, full])
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[2:]]
    assert rows[0][-3:-1] == ["of copy bandwidth", "target"]
    found = {row[0]: row[-3:-1] for row in rows[2:]}
    assert found == {
        "product/8: at once": ["25%", "2.00 times faster: met; 70% of copy bandwidth: not met"],
        "product/4: at once": ["-", "-"],
    }
    (table,) = rich_tables([full])
    cells = [next(iter(column.cells)).plain for column in table.columns]
    assert cells[-2:] == found["product/8: at once"]
    assert "target" not in markdown(SUITE, GROUPS["product"], [bare])


@pytest.mark.parametrize(
    ("measure", "least", "text"),
    [
        ("ratio", 1.0, "1.00 times faster: met"),
        ("rate", 1234.5, "1,234 a second: met"),
        ("copy_share", 0.55, "55% of copy bandwidth: met"),
        ("matmul_share", 0.46, "46% of matmul peak: met"),
    ],
)
def test_what_a_target_says(measure, least, text):
    assert targets(speed(targets={measure: {"least": least, "value": 1e9, "met": True}})) == text
    assert targets(speed()) == "-"


def test_plain_text_is_as_wide_as_it_must_be():
    assert plain(["a", "long"], [["wider", "b"], ["c", ""]]) == "a      long\n-----  ----\nwider  b\nc"


def test_markdown_of_figures():
    text = markdown(SUITE, GROUPS["share"], [quality(floor=0.5), quality("share, size = 2", chance=None, seconds=None)])
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[2:]]
    command = "`dsd-fast bench tiny --only product/8`"
    assert rows[0] == ["what", "value (95 %)", "n", "chance", "floor", "time per item", "command"]
    assert rows[2] == ["share, size = 1", "0.800 (0.700 to 0.900)", "100", "0.50", "0.50", "10 ms per pair", command]
    assert rows[3] == ["share, size = 2", "0.800 (0.700 to 0.900)", "100", "-", "-", "-", command]


def test_a_wide_table_has_a_column_for_each_size():
    records = [
        record | {"command": f"dsd-fast bench tiny --only 'some set: {k}' --long"} for k, record in enumerate(grown())
    ]
    text = markdown(GROWTH, GROWTH.groups[0], records)
    head, blank, *table = text.splitlines()
    assert head.startswith("Shares by size. Processor, 2 CPU threads;")
    assert head.endswith("2026-01-02. Made by `dsd-fast bench tiny --long`.")
    assert blank == ""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    assert rows == [
        ["what", "0 size", "2 size", "4 size", "n", "chance"],
        ["---"] * 6,
        ["first", "-", "0.800 (0.700 to 0.900)", "0.500 (0.400 to 0.600)", "100", "0.50"],
        ["second, by half", "-", "0.900 (0.800 to 1.000)", "-", "100", "0.50"],
        ["before", "0.300 (0.200 to 0.400)", "-", "-", "100", "0.50"],
    ]


def test_names_may_be_parted_into_lines_and_columns():
    names = [("plain, at 1; red", 0.5, 100), ("plain, at 1; blue", 0.25, 40), ("other; blue", 0.75, 100)]
    records = [
        quality() | {"name": name, "value": value, "low": value, "high": value, "n": n} for name, value, n in names
    ]
    _, _, *table = markdown(SUITE, replace(GROUPS["share"], columns="; "), records).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    assert rows == [
        ["what", "red", "blue", "n", "chance"],
        ["---"] * 5,
        ["plain, at 1", "0.500", "0.250", "40 to 100", "0.50"],
        ["other", "-", "0.750", "100", "0.50"],
    ]


def test_tables_show_the_latest_passing_record_of_cases_that_exist_in_the_suites_order():
    other = speed()["machine"] | {"name": "Another"}
    records = [
        speed("product/4"),
        speed(median=1.0, low=1.0, high=1.0),
        speed("gone/4"),
        speed(),
        refused(),
        speed(machine=other, dirty=True),
        quality(),
    ]
    parts = markdown(SUITE, GROUPS["product"], records).split("\n\n")
    assert len(parts) == 4
    assert "Another, 2 CPU threads" in parts[0]
    assert "commit 012345678 with changes" in parts[0]
    assert [line.split(":")[0] for line in parts[3].splitlines()[2:]] == ["| product/8", "| product/4"]
    assert "4.00 (3.50 to 4.50)" in parts[3]
    assert "1.00 (1.00 to 1.00)" not in parts[3]


def test_a_group_without_records_says_so():
    text = markdown(SUITE, GROUPS["empty"], [speed()])
    assert text == "Nothing yet: not measured yet; `dsd-fast bench tiny` does it."


@pytest.mark.parametrize(("devices", "option"), [(("cuda",), " --device cuda"), (("cpu", "cuda"), "")])
def test_a_group_that_needs_a_gpu_says_so(devices, option):
    made = Suite("tiny", [Group("g", "G")], [Case("c", "g", lambda context: None, devices=devices)])
    assert markdown(made, made.groups[0], []) == f"G: not measured yet; `dsd-fast bench tiny{option}` does it."


def test_provenance_names_every_version_commit_and_day():
    rows = [speed(), speed(commit="fedcba9876543210", date="2026-02-03T00:00:00Z", machine=speed()["machine"])]
    rows[1]["versions"] = rows[1]["versions"] | {"torch": "2.14.0"}
    text = provenance(rows)
    assert "torch 2.13.0" in text
    assert "torch 2.14.0" in text
    assert text.endswith("commit 012345678, fedcba987; 2026-01-02 to 2026-02-03.")
    gpu = speed(machine={**speed()["machine"], "kind": "cuda", "name": "GPU", "driver": "1.2", "threads": 1})
    assert provenance([gpu]).startswith("GPU, 1 CPU thread, driver 1.2; ")


def test_a_cell_cannot_break_the_table():
    record = speed(subject=speed()["subject"] | {"name": "a | b"})
    assert "product/8: a \\| b |" in markdown(SUITE, GROUPS["product"], [record])


def read(cell, like):
    """A cell as what it was."""
    if like is None:
        return None if cell == "" else cell
    if isinstance(like, dict):
        return json.loads(cell)
    if isinstance(like, bool):
        return {"true": True, "false": False}[cell]
    return type(like)(cell)


def test_csv_round_trip():
    records = [speed(), quality(value=1 / 3, low=0.1), refused(), speed('a, "b"\nc', median=0.1 + 0.2)]
    rows = list(csv.DictReader(io.StringIO(csv_text(records), newline="")))
    assert len(rows) == 4
    for record, row in zip(records, rows, strict=True):
        fields = flat(record)
        assert {name: read(row[name], value) for name, value in fields.items()} == fields
        assert {row[name] for name in row.keys() - fields.keys()} <= {""}


def test_tables_for_the_terminal_have_all_but_the_refused():
    speeds, figures = rich_tables([speed(), quality(), refused()])
    assert speeds.row_count == figures.row_count == 1
    cells = [next(iter(column.cells)).plain for column in speeds.columns]
    assert cells == ["product/8", "31.2 ms per row", "125 ms", "4.00 (3.50 to 4.50)", "1.0e-06, 1e-05"]
    assert rich_tables([refused()]) == []


def test_a_figure_below_its_floor_is_shown_and_says_so():
    low = quality(value=0.7, low=0.6, high=0.75, floor=0.8, ok=False, reason="below its floor")
    assert quality_row(low)[1:5:3] == ("0.700 (0.600 to 0.750)", "0.80, not reached")


def test_too_few_repeats_give_no_interval():
    row = speed_row(speed(ratio={"median": 2.0, "low": 1.0, "high": 3.0, "coverage": 0.75}))
    assert row[5] == "2.00"


def test_units_other_than_shares_are_named_and_counts_have_no_interval():
    assert quality_row(quality(unit="MB", value=15.0, low=15.0, high=15.0))[1] == "15.000 MB"


def test_figures_of_former_weights_are_left_out():
    former = quality(versions=quality()["versions"] | {"mini": "76543210"})

    def shown(*records):
        return [row for rows in chosen(SUITE, GROUPS["share"], records).values() for row in rows]

    assert shown(former) == [former]
    assert shown(former | {"name": "share, size = 2"}, quality()) == [quality()]
    assert shown(quality(), former | {"name": "share, size = 2"}) == [former | {"name": "share, size = 2"}]
