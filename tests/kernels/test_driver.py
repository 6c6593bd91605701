"""The GPU that is not there: what is launched, what is compiled for it, and what is not compiled again."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from dsd_fast.kernels.common.resources import SHARED_LIMIT
from tests.kernels.driver import absent_gpu

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
