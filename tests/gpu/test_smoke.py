"""The first tests on a CUDA device: accuracy and gradients at the networks' widths, replays, and no waits."""

import pytest
import torch

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.cross_attention_score import cross_attention_score
from tests.gpu.smoke import ATTENTION, Attention

pytestmark = [pytest.mark.gpu, pytest.mark.smoke]


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def waiting_is_an_error():
    """What is called inside must not wait for the device."""

    def check(call):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return check


def results(problem, q, k, v, index):
    leaves = [x.detach().requires_grad_(problem.gradients) for x in (q, k, v) if x is not None]
    values = leaves[2] if problem.output else None
    out, score = cross_attention_score(*leaves[:2], values, heads=4, text_index=index, mean=True)
    shown = [x for x in (out, score) if x is not None]
    grads = torch.autograd.grad(sum(x.float().square().sum() for x in shown), leaves) if problem.gradients else ()
    return [x.detach().double().cpu() for x in (*shown, *grads)]


@pytest.mark.parametrize("problem", ATTENTION, ids=str)
def test_attention_is_as_exact_as_plain_torch(problem):
    """At most twice plain torch's own error, and one unit in the last place of the largest value."""
    tensors = problem.tensors("cuda")
    found = results(problem, *tensors)
    assert backend.last("cross_attention_score") == "triton"
    with backend.force("reference"):
        plain = results(problem, *tensors)
    truth = results(problem, *(x.double() if x is not None and x.is_floating_point() else x for x in tensors))
    for ours, theirs, true in zip(found, plain, truth, strict=True):
        limit = 2 * float((theirs - true).abs().max()) + float(true.abs().max()) * torch.finfo(problem.dtype).eps
        assert float((ours - true).abs().max()) <= limit


def test_attention_waits_for_nothing_and_repeats_itself(waiting_is_an_error):
    q, k, v, index = Attention(40).tensors("cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def once():
        out, score = cross_attention_score(*leaves, heads=4, text_index=index, mean=True)
        return out, score, *torch.autograd.grad(out.float().square().sum() + score.sum(), leaves)

    first = once()
    assert all(torch.equal(a, b) for a, b in zip(first, waiting_is_an_error(once), strict=True))


@pytest.fixture
def case():
    pytest.importorskip("diffusers")
    from tests.gpu.test_runtimes import Case

    torch._dynamo.reset()
    return Case()


def test_recordings_of_two_buckets_share_their_memory_and_answer_as_the_plain_run(case):
    from tests.gpu.test_runtimes import close, run

    plain, plan = case.plan(), case.plan().compile("cudagraph")
    requests = [case.request(2, 3, rows, seed=rows) for rows in (16, 5)]
    with torch.no_grad():
        for request in (*requests, *requests):
            close(run(plan, request), run(plain, request))
            held = plan._runtime._recorder.held
            if request is requests[0]:
                largest = held
        assert len(plan._runtime._recordings) == 2
        # The allocator rounds what it takes to 2 MiB, and results stay.
        assert held <= 1.25 * largest + (8 << 20)


def test_replays_stay_right_beside_inductors_own_graphs(case):
    """Those clear cuBLAS's workspaces, and what is freed is given back to the driver."""
    from tests.gpu.test_runtimes import close, run

    plan, request = case.plan().compile("cudagraph"), case.request()
    with torch.no_grad():
        want = run(case.plan(), request)
        close(run(plan, request), want)
        theirs = torch.compile(lambda x: (x @ x).relu(), mode="reduce-overhead")
        x = torch.randn(256, 256, device="cuda")
        for _ in range(4):
            theirs(x).clone()
            torch.cuda.empty_cache()
            close(run(plan, request), want)
        close(run(plan, case.request(2, 3, 9)), run(case.plan(), case.request(2, 3, 9)))


@pytest.mark.parametrize("runtime", [None, "cudagraph"], ids=str)
def test_streams_wait_for_nothing(case, runtime, waiting_is_an_error):
    plan = case.plan() if runtime is None else case.plan().compile(runtime)
    request = case.request(4, 3, 24)
    with torch.no_grad():
        text = plan.encode_text(request.pop("states"), pooled=request.pop("pooled"))
        budget = plan.text_bytes(text) + plan.run_bytes(8, 16, 16, 77)
        out = plan.empty_output(24, 16, 16, tokens=77)

        def stream():
            return plan.stream(text=text, **request, out=out, memory_budget=budget)

        want = stream().clone()
        waiting_is_an_error(stream)
    for (_, a), (_, b) in zip(out.tensors(), want.tensors(), strict=True):
        assert torch.equal(a, b)


def test_steps_of_a_fit_wait_for_nothing(waiting_is_an_error):
    pytest.importorskip("diffusers")
    from dsd_fast.matching.fitting.config import FitConfig
    from tests.matching.fitting.parts import learned, pipeline, training

    run = training(learned(pipeline().to("cuda"), timesteps=[300]), FitConfig(batch_size=2))
    run._step()
    waiting_is_an_error(run._step)
    run._read()
    assert len(run.state.losses) == 2
