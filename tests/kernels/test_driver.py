"""The GPU that is not there: what is launched, what is compiled for it, and what is not compiled again."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from dsd_fast.kernels.common import kernel
from dsd_fast.kernels.common.resources import SHARED_LIMIT
from dsd_fast.kernels.cross_attention_score import kernel as attention
from tests.kernels.driver import PROCESSORS, absent_gpu

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="interpreted kernels are not compiled")


@triton.jit
def double_kernel(p_y, p_x, n, BLOCK: tl.constexpr):
    i_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + i_x, 2 * tl.load(p_x + i_x, mask=i_x < n), mask=i_x < n)


@triton.jit
def exchange_kernel(p_y, p_x, SIZE: tl.constexpr):
    i_x = tl.arange(0, SIZE)
    b_x = tl.load(p_x + i_x[:, None] * SIZE + i_x[None, :])
    tl.store(p_y + i_x[:, None] * SIZE + i_x[None, :], tl.dot(b_x, b_x))


def test_launches_and_compilations_are_written_down(tmp_path):
    x = torch.zeros(1000)
    with absent_gpu(cache=tmp_path) as gpu:
        for size in (1000, 999, 997, 1000):
            double_kernel[(triton.cdiv(size, 256),)](torch.empty(size), x, size, BLOCK=256, num_warps=2)
    assert [(each.kernel, each.grid, each.warps) for each in gpu.launches] == [("double_kernel", (4, 1, 1), 2)] * 4
    # A size is one or a multiple of 16 or neither, so 1000, 999 and 997 are one kernel.
    assert [(found.kernel, found.cached, found.stack) for found in gpu.compilations] == [("double_kernel", False, 0)]
    assert gpu.compilations[0].seconds > 0
    assert 8 <= gpu.compilations[0].registers <= 64


def test_what_a_gpu_could_not_launch_is_an_error(tmp_path, monkeypatch):
    x = torch.zeros(32, 32)
    monkeypatch.setitem(SHARED_LIMIT, 90, 1024)
    with absent_gpu(90, tmp_path) as gpu:
        with pytest.raises(AssertionError, match="0, 1, 1"):
            double_kernel[(0,)](x, x, 1, BLOCK=16)
        with pytest.raises(OutOfResources, match="shared memory"):
            exchange_kernel[(1,)](x, x, SIZE=32)
    assert gpu.launches == []


def test_each_gpu_begins_without_anything_compiled(tmp_path):
    x = torch.zeros(16)
    for number, capability in enumerate((90, 80, 90)):
        with absent_gpu(capability, tmp_path) as gpu:
            double_kernel[(1,)](x, x, 16, BLOCK=16)
        assert [found.cached for found in gpu.compilations] == [number == 2]


def test_an_operator_is_compiled_once_for_all_sizes_and_launched_in_the_spans_that_are_chosen(monkeypatch):
    monkeypatch.setattr(kernel, "processors", lambda device: PROCESSORS)
    text = torch.zeros(2, 77, 320, dtype=torch.bfloat16)
    with absent_gpu() as gpu:
        for rows, length in ((2, 4096), (3, 4000), (1, 64)):
            q = torch.zeros(rows, length, 320, dtype=torch.bfloat16)
            index = torch.zeros(rows, dtype=torch.int64)
            options = (index, None, None, None, 8, 0.2, True, False)
            out, score, _ = attention.forward(q, text, text, *options)
            assert (out.shape, score.shape) == (q.shape, (rows, 8))
    assert [found.kernel for found in gpu.compilations] == ["forward_kernel", "mean_kernel"]
    assert [found.stack for found in gpu.compilations] == [0, 0]
    blocks, programs = (64, 63, 1), (16, 24, 8)
    launch = attention.LAUNCHES[40]
    spans = [
        triton.cdiv(n, kernel.blocks_of_span(text.device, launch, each, n))
        for n, each in zip(blocks, programs, strict=True)
    ]
    grids = [launched.grid[0] for launched in gpu.launches if launched.kernel == "forward_kernel"]
    assert grids == [n * each for n, each in zip(spans, programs, strict=True)]
    assert [launched.grid[0] for launched in gpu.launches if launched.kernel == "mean_kernel"] == list(programs)
    assert spans[2] == 1 < spans[1] < spans[0]
