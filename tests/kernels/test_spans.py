"""How many blocks a program works through: by the model of waves that README.md of cross_attention_score states."""

import csv
import itertools

import pytest
import torch

pytest.importorskip("triton")

from dsd_fast.kernels.common import kernel as common
from dsd_fast.kernels.cross_attention_score import kernel
from tests.repository.source import ROOT

PROCESSORS = 132
CPU = torch.device("cpu")

# Rows, positions, heads and width of layers; the spans that are chosen on an H200, and how near they come to a GPU
# that is never idle and starts no program, beside what sixteen programs a multiprocessor come to.
TABLE = list(csv.DictReader((ROOT / "tests/kernels/spans.csv").read_text().splitlines()))

LAYERS = [
    (4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160), (9216, 5, 64), (2304, 10, 64), (576, 20, 64),
    (4096, 10, 64), (1024, 20, 64), (1000, 3, 40),
]  # fmt: skip
BATCHES = (1, 2, 3, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 640)


@pytest.fixture(autouse=True)
def an_h200(monkeypatch):
    monkeypatch.setattr(common, "processors", lambda device: PROCESSORS)


def efficiency(launch, programs, blocks, spans, start=common.START):
    """Written out: every wave takes what its fullest multiprocessor does, and no program is faster than alone."""
    span = -(-blocks // spans)
    count = -(-blocks // span) * programs
    resident = launch.resident[90]
    alone = launch.alone or resident
    full, rest = divmod(count, PROCESSORS * resident)
    clocks = full * resident + (max(alone, -(-rest // PROCESSORS)) if rest else 0)
    return programs * blocks / PROCESSORS / (clocks * (span + start))


def sixteen(programs, blocks, wanted=16):
    """The rule before: enough spans for ``wanted`` programs a multiprocessor."""
    return max(1, min(blocks, -(-wanted * PROCESSORS // programs)))


@pytest.mark.parametrize(
    "row", TABLE, ids=lambda row: f"{row['rows']}x{row['positions']}x{row['heads']}x{row['width']}"
)
def test_spans_and_their_predicted_efficiency(row):
    rows, positions, heads, width = (int(row[name]) for name in ("rows", "positions", "heads", "width"))
    launch, blocks = kernel.launch_for(torch.bfloat16, width), -(-positions // 64)
    span = common.blocks_of_span(CPU, launch, rows * heads, blocks)
    assert -(-blocks // span) == int(row["spans"])
    assert efficiency(launch, rows * heads, blocks, -(-blocks // span)) == pytest.approx(
        float(row["efficiency"]), abs=0.005
    )
    before = efficiency(launch, rows * heads, blocks, sixteen(rows * heads, blocks))
    assert before == pytest.approx(float(row["sixteen"]), abs=0.005)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_never_worse_than_sixteen_programs_a_multiprocessor(layer):
    positions, heads, width = layer
    tables = [kernel.LAUNCHES, kernel.SCORE_LAUNCHES, kernel.QUERY_LAUNCHES]
    for table, rows in itertools.product(tables, BATCHES):
        if width > max(table):
            continue
        launch = common.widest(table, width)
        blocks, programs = -(-positions // launch.block), rows * heads
        span = common.blocks_of_span(CPU, launch, programs, blocks)
        assert 1 <= span <= blocks
        chosen = efficiency(launch, programs, blocks, -(-blocks // span))
        assert chosen >= efficiency(launch, programs, blocks, sixteen(programs, blocks)) - 1e-12, (rows, layer)


def test_text_spans_are_no_more_than_their_parts_may_be():
    launch = kernel.TEXT_LAUNCHES[40]
    for programs, blocks in itertools.product((1, 16, 100, 528, 529, 5000), (1, 2, 128)):
        span = common.blocks_of_span(CPU, launch, programs, blocks, kernel.TEXT_PROGRAMS, kernel.TEXT_START)
        spans, most = -(-blocks // span), sixteen(programs, blocks, kernel.TEXT_PROGRAMS)
        assert spans <= most
        chosen, before = (efficiency(launch, programs, blocks, n, kernel.TEXT_START) for n in (spans, most))
        assert chosen >= before


def test_a_launch_without_a_judgement_is_taken_to_have_128_registers_a_thread():
    wide, narrow = kernel.Launch(64, 8, 1), kernel.Launch(64, 4, 1)
    assert common.blocks_of_span(CPU, wide, 2 * PROCESSORS, 8) == 8
    assert common.blocks_of_span(CPU, narrow, 2 * PROCESSORS, 8) == 4
