"""The engine on a CUDA device: the same numbers as on the CPU, within its memory, equal on repeats."""

import pytest
import torch

from dsd_fast.kernels.cross_attention_score import cross_attention_score

pytest.importorskip("diffusers")

import dsd_fast as dsd
from dsd_fast.unet import UNetProgram
from dsd_fast.unet.stream import default_budget
from tests.matching.test_matcher import CAPTIONS, TIMES, pictures
from tests.tiny import CROSS_ATTENTION_DIM, FAMILIES, POOLED_DIM, tiny_pipeline, tiny_unet

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_operator_and_gradients_equal_the_cpus(dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, t, 4 * 40, generator=g).to(dtype) for n, t in ((6, 97), (3, 77), (3, 77)))
    index = torch.tensor([2, 0, 0, 2, 1, 2])
    results = {}
    for device, kind in (("cpu", torch.float64), ("cpu", dtype), ("cuda", dtype)):
        leaves = [x.to(device, kind).requires_grad_() for x in (q, k, v)]
        out, score = cross_attention_score(*leaves, heads=4, text_index=index.to(device))
        grads = torch.autograd.grad(out.sum() + score.sum(), leaves)
        results[device, kind] = [x.detach().double().cpu() for x in (out, score, *grads)]
    truth, cpu, gpu = results.values()
    for a, b, true in zip(gpu, cpu, truth, strict=True):
        limit = 2 * float((b - true).abs().max()) + float(true.abs().max()) * torch.finfo(dtype).eps
        assert float((a - true).abs().max()) <= limit


def test_gradients_are_equal_to_the_bit_on_repeats():
    q, k, v = (torch.randn(n, t, 160, device="cuda", requires_grad=True) for n, t in ((16, 256), (3, 77), (3, 77)))
    index = torch.arange(16, device="cuda") % 3

    def once():
        out, score = cross_attention_score(q, k, v, heads=4, text_index=index)
        return torch.autograd.grad(out.square().sum() + score.sum(), (q, k, v))

    first = once()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_equals_diffusers_own_forward(family, dtype):
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 16, 16, generator=g)
    states = torch.randn(3, 77, CROSS_ATTENTION_DIM[family], generator=g)
    pooled = torch.randn(3, POOLED_DIM, generator=g) if family == "sdxl" else None
    ids = torch.ones(6) if family == "sdxl" else None

    def added(to):
        return None if pooled is None else {"text_embeds": to(pooled), "time_ids": to(ids.expand(3, 6))}

    with torch.no_grad():
        truth = tiny_unet(family).double()(
            latents.double(), 400, states.double(), added_cond_kwargs=added(lambda x: x.double())
        )
        unet = tiny_unet(family).to("cuda", dtype)
        theirs = unet(
            latents.to("cuda", dtype),
            400,
            states.to("cuda", dtype),
            added_cond_kwargs=added(lambda x: x.to("cuda", dtype)),
        )
        plan = UNetProgram(unet).plan(noise_pred=True)
        text = plan.encode_text(states.to("cuda", dtype), pooled=None if pooled is None else pooled.to("cuda", dtype))
        ours = plan.run(latents.to("cuda", dtype), 400, text, time_ids=ids).noise_pred
    error, naive = (float((x.double().cpu() - truth.sample).abs().max()) for x in (ours, theirs.sample))
    assert error <= 2 * naive + float(truth.sample.abs().max()) * torch.finfo(dtype).eps


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_the_cpus(family):
    config = dsd.MatchConfig(timesteps=TIMES)
    images = pictures(3)
    want = dsd.Matcher(dsd.from_pipeline(tiny_pipeline(family)), config).score(images, CAPTIONS)
    got = dsd.Matcher(dsd.from_pipeline(tiny_pipeline(family).to("cuda")), config).score(images, CAPTIONS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_a_stream_stays_within_its_budget():
    unet = tiny_unet("sd15").to("cuda")
    plan = UNetProgram(unet).plan(noise_pred=True)
    with torch.no_grad():
        text = plan.encode_text(torch.randn(4, 77, CROSS_ATTENTION_DIM["sd15"], device="cuda"))
    latents, index = torch.randn(64, 4, 64, 64), torch.arange(256) // 4
    budget = text.nbytes + plan.run_bytes(16, 64, 64, 77)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _rows, _out in plan.stream(
            latents, 10, text, latent_index=index, text_index=torch.arange(256) % 4, memory_budget=budget
        ):
            pass
        used = torch.cuda.max_memory_allocated() - before
    assert used <= budget
    assert default_budget(torch.device("cuda")) > budget
