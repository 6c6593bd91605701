"""Compiled runtimes on a CUDA device: the plain run's numbers, answers that stay, no waiting, no growth."""

import threading

import pytest
import torch

pytest.importorskip("diffusers")

from dsd_fast.unet import Output, UNetProgram
from dsd_fast.unet.cudagraph import WARM_UPS, CudaRecorder
from tests.tiny import CROSS_ATTENTION_DIM, FAMILIES, POOLED_DIM, tiny_unet

pytestmark = pytest.mark.gpu

RUNTIMES = ("inductor", "cudagraph")
TOKENS = 77


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Case:
    """A network on the GPU, a plan with a score, a feature and the output, and its requests."""

    def __init__(self, family="sd15", dtype=torch.float32, device="cuda"):
        self.family, self.dtype, self.device = family, dtype, torch.device(device)
        unet = tiny_unet(family).requires_grad_(False).to(self.device, dtype)
        self.unet = unet.to(memory_format=torch.channels_last)
        self.program = UNetProgram(self.unet)

    def plan(self, **asked):
        default = {"features": ["mid-vit-out"], "scores": self.program.score_ids[-2:], "noise_pred": True}
        return self.program.plan(**(asked or default))

    def request(self, latents=2, texts=3, rows=5, seed=0):
        g = torch.Generator().manual_seed(seed)
        xl = self.family == "sdxl"
        return {
            "latents": torch.randn(latents, 4, 16, 16, generator=g).to(self.device, self.dtype),
            "timesteps": torch.randint(0, 1000, (latents,), generator=g),
            "states": torch.randn(texts, TOKENS, CROSS_ATTENTION_DIM[self.family], generator=g).to(
                self.device, self.dtype
            ),
            "pooled": torch.randn(texts, POOLED_DIM, generator=g).to(self.device, self.dtype) if xl else None,
            "latent_index": torch.randint(latents, (rows,), generator=g),
            "text_index": torch.randint(texts, (rows,), generator=g),
            "time_ids": torch.ones(6) if xl else None,
        }


def run(plan, request, **options):
    request = dict(request)
    text = plan.encode_text(request.pop("states"), pooled=request.pop("pooled"))
    return plan.run(request.pop("latents"), request.pop("timesteps"), text, **request, **options)


def as_exact(got, plain, truth, dtype):
    """At most twice the plain run's own error, and one unit in the last place of the largest value."""
    for (name, a), (_, b), (_, true) in zip(got.tensors(), plain.tensors(), truth.tensors(), strict=True):
        error, naive = (float((x.double() - true).abs().max()) for x in (a, b))
        assert error <= 2 * naive + float(true.abs().max()) * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_as_exact_as_the_plain_runs(family, dtype, runtime):
    case, exact = Case(family, dtype), Case(family, torch.float64)
    request = case.request()
    wide = {k: v.double() if k in ("latents", "states", "pooled") and v is not None else v for k, v in request.items()}
    with torch.no_grad():
        truth, plain = run(exact.plan(), wide), run(case.plan(), request)
        compiled = case.plan().compile(runtime)
        for _ in range(2):
            as_exact(run(compiled, request), plain, truth, dtype)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_answers_are_not_overwritten_by_the_next_call(runtime):
    case = Case()
    plan = case.plan().compile(runtime)
    with torch.no_grad():
        first = run(plan, case.request())
        kept = first.clone()
        second = run(plan, case.request(seed=1))
        out = case.plan().empty_output(5, 16, 16, tokens=TOKENS)
        assert run(plan, case.request(), out=out) is out
        run(plan, case.request(seed=2))
    for (_, a), (_, b), (_, c), (_, d) in zip(
        first.tensors(), kept.tensors(), second.tensors(), out.tensors(), strict=True
    ):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        torch.testing.assert_close(d, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def close(got, want):
    for (name, a), (_, b) in zip(got.tensors(), want.tensors(), strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()), name


def test_weights_changed_in_place_are_seen_and_replaced_ones_recorded_anew():
    case = Case()
    plan, plain, request = case.plan().compile("cudagraph"), case.plan(), case.request()
    with torch.no_grad():
        close(run(plan, request), run(plain, request))
        case.unet.conv_in.weight.mul_(1.5)
        close(run(plan, request), run(plain, request))
        assert len(plan._runtime._recordings) == 1
        kept = case.unet.conv_in.weight
        case.unet.conv_in.weight = torch.nn.Parameter(kept * 2, requires_grad=False)
        close(run(plan, request), run(plain, request))


def test_a_replay_waits_for_nothing():
    case = Case()
    plan, request = case.plan().compile("cudagraph"), case.request()
    with torch.no_grad():
        text = plan.encode_text(request.pop("states"), pooled=request.pop("pooled"))
        plan.run(text=text, **request)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for index in (request["text_index"], request["text_index"].tolist()):
                plan.run(text=text, **(request | {"text_index": index}))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_memory_does_not_grow(runtime):
    case = Case()
    plan = case.plan().compile(runtime)
    used = []
    with torch.no_grad():
        for number in range(200):
            run(plan, case.request(rows=5 + number % 4, seed=number))
            if number in (20, 199):
                torch.cuda.synchronize()
                used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert used[1] == used[0]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_nothing_is_compiled_or_recorded_again_inside_a_bucket(runtime):
    case = Case()
    plan, plain = case.plan().compile(runtime), case.plan()
    with torch.no_grad():
        run(plan, case.request(2, 3, 5))
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            for sizes in ((2, 4, 8), (2, 3, 6), (2, 4, 7)):
                close(run(plan, case.request(*sizes)), run(plain, case.request(*sizes)))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        if runtime == "cudagraph":
            assert len(plan._runtime._recordings) == 1
            run(plan, case.request(2, 3, 9))
            assert len(plan._runtime._recordings) == 2
            close(run(plan, case.request(2, 3, 5)), run(plain, case.request(2, 3, 5)))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_any_stream(runtime):
    case = Case()
    plan, requests = case.plan().compile(runtime), [case.request(seed=seed) for seed in range(8)]
    with torch.no_grad():
        want = [run(case.plan(), request) for request in requests]
        streams = [torch.cuda.Stream() for _ in requests]
        torch.cuda.synchronize()
        got = []
        # All at once: replays share their memory and must take turns.
        for stream, request in zip(streams, requests, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(plan, request))
        torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_host_threads(runtime):
    case = Case()
    plan, requests = case.plan().compile(runtime), [case.request(seed=seed) for seed in range(8)]
    with torch.no_grad():
        want = [run(case.plan(), request) for request in requests]
        run(plan, requests[0])
    torch.cuda.synchronize()
    got = {}

    def answer(number):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            got[number] = run(plan, requests[number])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=answer, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, answered in enumerate(want):
        close(got[number], answered)


def test_a_recording_that_runs_out_of_memory_says_so_and_another_can_be_made():
    recorder, calls = CudaRecorder(torch.device("cuda", torch.cuda.current_device())), []
    x = torch.ones(4, device="cuda")

    def work(limit):
        calls.append(limit)
        if len(calls) > limit:
            torch.empty(1 << 50, device="cuda")
        return Output(noise_pred=x * 2)

    with pytest.raises(torch.OutOfMemoryError):
        recorder.record(lambda: work(WARM_UPS))
    replay, output = recorder.record(lambda: work(10**6))
    x.fill_(3)
    with recorder.turn():
        replay()
    assert output.noise_pred.tolist() == [6.0] * 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_network_on_another_device_than_the_current_one(runtime):
    case = Case(device="cuda:1")
    with torch.no_grad():
        close(run(case.plan().compile(runtime), case.request()), run(case.plan(), case.request()))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_gradients_are_the_plain_runs(runtime):
    case = Case(dtype=torch.float64)
    grads = []
    for plan in (case.plan(), case.plan().compile(runtime)):
        request = case.request()
        leaves = [request["latents"].requires_grad_(), request["states"].requires_grad_()]
        out = run(plan, request)
        grads.append(torch.autograd.grad(out.noise_pred.square().sum() + out.scores[plan.scores[0]].sum(), leaves))
    for a, b in zip(*grads, strict=True):
        assert float((a - b).abs().max()) <= 1e-11 * float(b.abs().max())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_stream_of_many_rows(runtime):
    case = Case()
    plan, plain = case.plan().compile(runtime), case.plan()
    request = case.request(7, 3, 50)
    with torch.no_grad():
        text = plan.encode_text(request.pop("states"), pooled=request.pop("pooled"))
        budget = text.nbytes + plan.run_bytes(12, 16, 16, TOKENS)
        out = plan.empty_output(50, 16, 16, tokens=TOKENS)
        plan.stream(text=text, **request, out=out, memory_budget=budget)
        close(out, plain.run(text=text, **request))
