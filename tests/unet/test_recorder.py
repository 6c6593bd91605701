"""Streams, pools and budgets of a GPU that is not there: what a recorder asks of torch.cuda, and what that costs."""

import contextlib
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import patch

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsd_fast.bench.suites.unet_networks import ARCHITECTURES
from dsd_fast.unet import Output, UNetProgram, cudagraph
from dsd_fast.unet.cost import Memory
from dsd_fast.unet.cudagraph import WARM_UPS, CudaRecorder
from dsd_fast.unet.network import Network
from dsd_fast.unet.stream import GPU_BUDGET, default_budget, rows_at_once
from tests.tiny import CROSS_ATTENTION_DIM, POOLED_DIM, tiny_unet

DEVICE = torch.device("cuda", 0)
GIB = 1 << 30


class Fake:
    """torch.cuda and its caching allocator: a free block goes to its own pool and stream alone.

    Attributes:
        calls: what was asked for, in order.
        places: (pool, stream) of each allocation.
        reserved, allocated: bytes.
    """

    def __init__(self, monkeypatch, total=1000):
        self.total, self.reserved, self.allocated = total, 0, 0
        self.calls, self.places, self.segments = [], [], defaultdict(list)
        self.stream, self.pool, self.streams, self.pools = "main", None, 0, 0
        fakes = {
            "graph_pool_handle": self.new_pool,
            "Stream": self.new_stream,
            "Event": lambda: self,
            "CUDAGraph": lambda: self,
            "current_stream": lambda *_: self.stream_object("main"),
            "current_device": lambda: 0,
            "stream": lambda stream: self.within(stream=stream.name),
            "device": lambda _: contextlib.nullcontext(),
            "graph": self.graph,
            "empty_cache": self.empty_cache,
            "memory_reserved": lambda *_: self.reserved,
            "memory_allocated": lambda *_: self.allocated,
            "mem_get_info": lambda *_: (self.total - self.reserved, self.total),
        }
        for name, value in fakes.items():
            monkeypatch.setattr(torch.cuda, name, value)
        ours = {
            "_cuda_clearCublasWorkspaces": lambda: self.calls.append("clear"),
            "_cuda_beginAllocateCurrentThreadToPool": lambda _, pool: self.enter(pool),
            "_cuda_endAllocateToPool": lambda *_: self.enter(None),
            "_cuda_releasePool": lambda *_: None,
        }
        for name, value in ours.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)

    def new_pool(self):
        self.pools += 1
        return f"pool {self.pools}"

    def new_stream(self, *_):
        self.streams += 1
        return self.stream_object(f"stream {self.streams}")

    @staticmethod
    def stream_object(name):
        return SimpleNamespace(name=name, wait_stream=lambda _: None, wait_event=lambda _: None)

    def enter(self, pool):
        self.pool = pool

    @contextlib.contextmanager
    def within(self, **change):
        before = {name: getattr(self, name) for name in change}
        vars(self).update(change)
        try:
            yield
        finally:
            vars(self).update(before)

    @contextlib.contextmanager
    def graph(self, _, *, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.empty_cache()
        self.calls.append(("capture", pool, stream.name))
        with self.within(pool=pool, stream=stream.name):
            yield

    def replay(self):
        self.calls.append("replay")

    def empty_cache(self):
        for place in [place for place in self.segments if place[0] is None]:
            self.reserved -= sum(self.segments.pop(place))

    def run(self, sizes):
        """Allocate blocks, then free them."""
        place = (self.pool, self.stream)
        self.places.append(place)
        # What remains of each segment; freed blocks side by side become one again.
        left = list(self.segments[place])
        for size in sizes:
            fitting = [number for number, room in enumerate(left) if room >= size]
            if fitting:
                left[min(fitting, key=lambda number: left[number])] -= size
            elif self.reserved + size > self.total:
                raise torch.OutOfMemoryError(f"{self.reserved} of {self.total} reserved, {size} wanted")
            else:
                self.reserved += size
                self.segments[place].append(size)
                left.append(0)
        return Output()


def test_all_is_recorded_and_warmed_up_on_one_stream_in_one_pool(monkeypatch):
    fake = Fake(monkeypatch)
    recorder = CudaRecorder(DEVICE)
    for size in (60, 40, 20):
        replay, _ = recorder.record(lambda size=size: fake.run([size]))
        replay()
    place = ("pool 1", "stream 1")
    assert fake.places == [place] * 3 * (WARM_UPS + 1)
    # The pool is kept by an empty graph. No recording has a workspace of cuBLAS from outside, and none leaves its own.
    record = ["clear", ("capture", *place), "clear", "replay"]
    assert fake.calls == [("capture", *place), *record * 3]
    assert (fake.stream, fake.pool) == ("main", None)


def test_recordings_together_take_what_the_largest_takes(monkeypatch):
    fake = Fake(monkeypatch)
    recorder = CudaRecorder(DEVICE)
    for rows in (16, 12, 4, 16):
        recorder.record(lambda rows=rows: fake.run([3 * rows, 2 * rows, rows]))
        assert (fake.reserved, recorder.held) == (6 * 16, 6 * 16)
    assert cudagraph.held_by_recordings(DEVICE) == recorder.held
    # Another plan's is not free for it, though nothing is allocated there.
    assert fake.allocated == 0
    assert default_budget(DEVICE) == int(0.8 * (1000 - 6 * 16))
    del recorder
    assert cudagraph.held_by_recordings(DEVICE) == 0


@pytest.mark.parametrize("tail", [0.9, 0.5, 0.1])
def test_the_default_budget_holds_a_stream_and_its_tail(monkeypatch, tail):
    fake = Fake(monkeypatch)
    recorder, budget = CudaRecorder(DEVICE), default_budget(DEVICE)
    for share in (1, tail, 1):
        recorder.record(lambda share=share: fake.run([int(share * budget / 4)] * 4))
    assert fake.reserved <= budget < fake.total


def test_what_runs_out_of_memory_says_so_and_is_counted(monkeypatch):
    fake = Fake(monkeypatch)
    recorder = CudaRecorder(DEVICE)
    with pytest.raises(torch.OutOfMemoryError, match="600 of 1000 reserved"):
        recorder.record(lambda: fake.run([600, 600]))
    assert fake.calls[-1] == "clear"
    assert recorder.held == 600
    assert (fake.stream, fake.pool) == ("main", None)
    recorder.record(lambda: fake.run([500]))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, torch.Tensor):
                self.most = max(self.most, result.numel())
        return results


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_no_tensor_of_a_run_has_more_elements_than_the_cost_model_says(family):
    unet, rows, largest = tiny_unet(family).requires_grad_(False), 2, Largest()
    plan = UNetProgram(unet).plan(noise_pred=True)
    pooled = torch.zeros(rows, POOLED_DIM) if family == "sdxl" else None
    text = plan.encode_text(torch.zeros(rows, 77, CROSS_ATTENTION_DIM[family]), pooled=pooled)
    with largest:
        plan.run(torch.zeros(rows, 4, 16, 16), 10, text, time_ids=None if pooled is None else torch.zeros(6))
    bound = Memory(plan, plan.network.sizes(16, 16), 77).largest
    assert bound / 4 < largest.most / rows <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_default_micro_batch_is_one_that_library_kernels_index(monkeypatch, name, dtype):
    """At real size, without numbers: 139 GiB are free, and what is asked for is the noise prediction."""
    architecture = ARCHITECTURES[name]
    nothing = {name: lambda x, *_, **__: x for name in ("kaiming_uniform_", "uniform_", "ones_", "zeros_")}
    with torch.device("meta"), patch.multiple(torch.nn.init, **nothing):
        unet = diffusers.UNet2DConditionModel(**architecture.config).to(dtype)
    plan, side = UNetProgram(unet).plan(noise_pred=True), architecture.side
    Fake(monkeypatch, 139 * GIB)
    monkeypatch.setattr(Network, "device", DEVICE)
    monkeypatch.setattr("dsd_fast.unet.cost.backend.choice", lambda *_: "triton")
    memory = Memory(plan, plan.network.sizes(side, side), 77)
    chosen = rows_at_once(plan, side, side, 77)
    assert memory.of(chosen) <= GPU_BUDGET
    assert chosen * memory.largest < 1 << 31
    # Whichever of the two is reached first; a larger budget does not go beyond the second.
    assert memory.of(chosen + 1) > GPU_BUDGET or (chosen + 1) * memory.largest >= 1 << 31
    assert rows_at_once(plan, side, side, 77, memory_budget=100 * GIB) * memory.largest < 1 << 31
    # As the benchmarks have it, a GPU is busy before.
    assert chosen >= 8
