"""Every tuned Triton kernel compiles, for every architecture without a GPU, and stays in registers."""

import re
from dataclasses import asdict, replace
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("triton")

import triton

from dsd_fast.bench import resources
from dsd_fast.kernels.common.resources import SHARED_LIMIT, measure
from dsd_fast.kernels.cross_attention_score import kernel
from tests.repository.source import ROOT

PINNED = next(
    line.removeprefix("triton==").strip()
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("triton==")
)

# Bytes that a version of Triton keeps on the stack in spite of all, by architecture: in 3.6 one pointer of four forward
# kernels on sm_100.
FRAMES = {"3.6": {100: 8}}.get(version("triton").rpartition(".")[0], {})

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="interpreted kernels are not compiled")

TABLE = resources.read_table(ROOT / resources.TABLE)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("operator", resources.operators())
def test_builds_use_what_the_table_says(operator):
    """A build of each kernel, on one architecture in turn; the digest of the sources speaks for the others."""
    builds = {build.kernel: build for build in resources.builds(operator)}
    for number, build in enumerate(builds.values()):
        capability = resources.CAPABILITIES[number % len(resources.CAPABILITIES)]
        used = measure(build, capability)
        assert used.stack <= FRAMES.get(capability, 0), build.name
        assert used.shared <= SHARED_LIMIT[capability], build.name
        if version("triton") == PINNED:
            source = resources.source_digest(operator)
            row = resources.Row(operator, build.name, capability, build.warps, **asdict(used), source=source)
            assert [row] == [
                found
                for found in TABLE
                if (found.operator, found.build, found.capability) == (operator, build.name, capability)
            ]


@pytest.mark.skipif(version("triton") != PINNED, reason="the table is of the pinned Triton")
def test_the_table_is_of_these_kernels():
    """All of it was compiled from them: `python -m dsd_fast.bench.resources --write` makes it anew."""
    assert {(row.operator, row.source) for row in TABLE} == {
        (operator, resources.source_digest(operator)) for operator in resources.operators()
    }


def test_no_kernel_of_the_table_needs_a_stack_frame():
    assert [row for row in TABLE if row.stack] == []
    assert [row for row in TABLE if row.shared > SHARED_LIMIT[row.capability]] == []


def test_the_table_has_every_operator_on_every_architecture_in_both_types():
    assert {row.operator for row in TABLE} == set(resources.operators())
    assert {"cross_attention_score", "token_maps"} <= set(resources.operators())
    for operator in resources.operators():
        builds = [(build.name, capability) for build in resources.builds(operator) for capability in (80, 90, 100)]
        assert [(row.build, row.capability) for row in TABLE if row.operator == operator] == builds
        assert len(set(builds)) == len(builds)
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
    spilling = replace(build, constants={**build.constants, "BLOCK": 128})
    assert measure(build, 90).stack == 0
    assert measure(spilling, 90).stack > 0


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
            ]
            assert len(found) == 2, (jit.__name__, names)
    assert len(seen) == 3
