"""Every tuned Triton kernel compiles, for every architecture without a GPU, and stays in registers."""

import csv
import dataclasses
import re
from importlib.metadata import version
from unittest.mock import MagicMock

import pytest
import torch

pytest.importorskip("triton")

import triton

from dsd_fast.bench import resources
from dsd_fast.kernels.common import sass
from dsd_fast.kernels.common.resources import SHARED_LIMIT, measure, resident
from dsd_fast.kernels.cross_attention_score import kernel
from tests.repository.source import ROOT

PINNED, OLDEST = resources.versions(ROOT)
INSTALLED = version("triton")

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="interpreted kernels are not compiled")

TABLE = resources.read_table(ROOT / resources.TABLE)

# What may be no worse, of the kernels that take the time on Hopper; written by hand, with the numbers of the table.
BUDGETS = list(csv.DictReader((ROOT / "tests/kernels/budgets.csv").read_text().splitlines()))
JUDGED = {(budget["operator"], budget["build"]) for budget in BUDGETS}


def compiled(operator):
    """A build of each kernel and an architecture: the first that has a budget, else the last, on each in turn."""
    builds = resources.builds(operator)
    last = {build.kernel: build for build in builds}
    chosen = {
        jit: (build, resources.CAPABILITIES[number % len(resources.CAPABILITIES)])
        for number, (jit, build) in enumerate(last.items())
    }
    judged = [build for build in reversed(builds) if (operator, build.name) in JUDGED]
    return list((chosen | {build.kernel: (build, resources.HOPPER) for build in judged}).values())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("operator", resources.operators())
def test_builds_use_what_the_table_says(operator):
    """A build of each kernel; the digest of the sources speaks for the others."""
    for build, capability in compiled(operator):
        row = resources.measured(operator, build, capability)
        assert (row.stack, row.local) == (0, 0), build.name
        assert row.shared <= SHARED_LIMIT[capability], build.name
        if INSTALLED in (PINNED, OLDEST) and resources.listed(build, capability, INSTALLED == PINNED):
            key = (operator, build.name, INSTALLED, capability)
            assert [row] == [x for x in TABLE if (x.operator, x.build, x.triton, x.capability) == key]


def test_the_table_is_of_these_kernels():
    """All of it was compiled from them: `python -m dsd_fast.bench.resources --write` makes a Triton's part anew."""
    assert {(row.operator, row.triton, row.source) for row in TABLE} == {
        (operator, triton, resources.source_digest(operator, triton))
        for operator in resources.operators()
        for triton in (PINNED, OLDEST)
    }


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: f"{budget['build']}, Triton {budget['triton']}")
def test_what_takes_the_time_stays_within_its_budget(budget):
    (row,) = [
        row
        for row in TABLE
        if (row.operator, row.build, row.triton) == (budget["operator"], budget["build"], budget["triton"])
        and row.capability == resources.HOPPER
    ]
    for name in ("slots", "barriers", "registers", "narrow", "local"):
        assert getattr(row, name) <= int(budget[name]), name
    for name in ("programs", "warpgroup", "wide"):
        assert getattr(row, name) >= int(budget[name]), name


def test_budgets_are_for_both_versions_and_for_every_kernel_of_the_attention():
    assert {budget["triton"] for budget in BUDGETS} == {PINNED, OLDEST}
    for triton_version in (PINNED, OLDEST):
        found = {(budget["operator"], budget["build"]) for budget in BUDGETS if budget["triton"] == triton_version}
        assert found == JUDGED
    for operator in ("cross_attention_score", "token_maps"):
        builds = resources.builds(operator)
        kernels = {build.kernel for build in builds if (operator, build.name) in JUDGED}
        # Keys of wide heads are streamed: the loop over them is of no layer that takes long.
        assert kernels >= {build.kernel for build in builds} - {kernel.query_loop_kernel}


def test_a_launch_says_how_many_of_its_programs_are_resident():
    """Of the pinned Triton; the oldest has no fewer on Hopper."""
    tables = {
        "output and score": kernel.LAUNCHES,
        "score alone": kernel.SCORE_LAUNCHES,
        "dq of output and mean": kernel.QUERY_LAUNCHES,
        "dk and dv of output and mean": kernel.TEXT_LAUNCHES,
    }
    checked = 0
    for row in TABLE:
        kind, width, _ = (*row.build.split(", "), "")[:3]
        width = int(width.removeprefix("D ")) if width.startswith("D ") else 0
        if row.operator == "cross_attention_score" and width in tables.get(kind, {}):
            programs = tables[kind][width].resident[row.capability]
            assert row.programs == programs if row.triton == PINNED else row.programs >= programs, row
            checked += 1
    assert checked > 80


def test_no_kernel_of_the_table_needs_a_stack_frame():
    assert [row for row in TABLE if row.stack] == []
    assert [row for row in TABLE if row.shared > SHARED_LIMIT[row.capability]] == []


def test_the_table_has_every_operator_on_every_architecture_in_both_types():
    assert {row.operator for row in TABLE} == set(resources.operators())
    assert {"cross_attention_score", "token_maps"} <= set(resources.operators())
    for operator in resources.operators():
        builds = [(build.name, capability) for build in resources.builds(operator) for capability in (80, 90, 100)]
        rows = [row for row in TABLE if row.operator == operator]
        assert [(row.build, row.capability) for row in rows if row.triton == PINNED] == builds
        assert len(set(builds)) == len(builds)
        oldest = [
            name
            for build, name in ((x, x.name) for x in resources.builds(operator))
            if "*bf16" in build.signature.values()
        ]
        assert [(row.build, row.capability) for row in rows if row.triton == OLDEST] == [(name, 90) for name in oldest]
        types = {kind for build in resources.builds(operator) for kind in build.signature.values()}
        assert {"*bf16", "*fp16"} <= types


def test_the_document_is_what_the_committed_table_says():
    text = (ROOT / resources.DOCUMENT).read_text()
    table = resources.read_table(ROOT / resources.TABLE)
    assert resources.filled(text, table) == text
    assert {row.operator for row in table} == set(resources.operators())
    for operator in resources.operators():
        assert f"<!-- resources:{operator} -->" in text


def test_every_grid_has_one_axis():
    """The others take 65535 programs at most, and there may be more texts or rows."""
    sources = [file.read_text() for file in (ROOT / "kernels").rglob("*kernel.py")]
    axes = [axis for source in sources for axis in re.findall(r"program_id\(([^)]*)\)", source)]
    assert len(axes) > 5
    assert set(axes) == {"0"}


@pytest.mark.newest
def test_a_spill_is_seen():
    """Four warps with a tile that needs many more registers than they have."""
    build = next(build for build in kernel.builds() if build.name.startswith("output and score, D 160"))
    spilling = dataclasses.replace(build, constants={**build.constants, "BLOCK": 128})
    sound, spilled = measure(build, 90), measure(spilling, 90)
    assert (sound.stack, sound.loop.local) == (0, 0)
    assert spilled.stack > 0
    assert spilled.loop.local > 0
    assert sound.loop.warpgroup > 0


@pytest.mark.parametrize("width", [40, 64, 80, 128, 160])
def test_a_launch_compiles_what_is_judged(width, monkeypatch):
    """The constants of a build are those of a launch with 77 tokens."""
    seen = {}

    class Recorder:
        def __init__(self, jit):
            self.jit = jit

        def __getitem__(self, grid):
            return lambda **arguments: seen.setdefault(self.jit, []).append(arguments)

    for name in ("forward_kernel", "query_kernel", "query_loop_kernel", "text_kernel"):
        monkeypatch.setattr(kernel, name, Recorder(getattr(kernel, name)))
    monkeypatch.setattr(kernel, "segment_sum", lambda part, total, *_: total)
    monkeypatch.setattr(kernel, "mean_kernel", MagicMock())
    q, k = torch.zeros(4, 40, 2 * width).half(), torch.zeros(2, 77, 2 * width).half()
    index = torch.tensor([0, 1, 1, 0])
    empty = (None, None, None)
    saved = kernel.forward(q, k, k, index, *empty, 2, 0.1, True, True)[2]
    kernel.backward(q, torch.zeros(4, 2), q, k, k, index, *empty, saved, 2, 0.1, True)
    monkeypatch.undo()
    names = [build.name for build in kernel.builds()]
    for jit, calls in seen.items():
        for arguments in calls:
            found = [
                build.name
                for build in kernel.builds()
                if build.kernel is jit
                and all(build.constants[name] == arguments[name] for name in build.constants)
                and {name for name in build.signature if name.startswith("p_")}
                == {name for name in arguments if name.startswith("p_") and arguments[name] is not None}
                and (build.warps, build.stages) == (arguments["num_warps"], arguments["num_stages"])
                and build.registers.get(90) == arguments["maxnreg"]
            ]
            assert len(found) == 2, (jit.__name__, names)
    assert len(seen) == 3


CODE = """
        .text.toy_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDL R9, [R1] ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R6.64] ;
        /*0030*/              @!P0 LDG.E R4, desc[UR4][R6.64] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0050*/                   HMMA.16816.F32 R8, R4, R2, R8 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_2:
        /*0070*/                   STG.E.128 desc[UR4][R6.64], R8 ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
        /*0090*/              @!P1 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
"""


def test_machine_code_is_read():
    assert sass.read(CODE) == sass.HotLoop(slots=8, barriers=1, warpgroup=1, warp=1, wide=2, narrow=1, local=1)
    straight = "\n".join(
        line for line in CODE.splitlines() if "BRA `(.L_x_1" not in line and "BRA `(.L_x_2" not in line
    )
    assert sass.read(straight).slots == 10
    with pytest.raises(RuntimeError, match="no instructions"):
        sass.read("nvdisasm fatal : no such file")


def test_programs_of_a_multiprocessor():
    assert [resident(registers, 0, 4, 90) for registers in (96, 97, 128, 129, 255)] == [5, 4, 4, 3, 2]
    assert resident(32, 53 * 1024, 4, 90) == 4
    assert resident(32, 53 * 1024, 4, 80) == 3
    assert resident(16, 0, 8, 90) == 8
    assert resident(32, 0, 4, 100, columns=256) == 2
