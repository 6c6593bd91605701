"""Compiled runtimes: the numbers of the plain run, in buckets, without compiling twice.

Most tests let torch.compile trace and differentiate but generate no code ("aot_eager"), which is where all but the
generated code could go wrong, or trace alone ("eager") where they look at what is compiled when; one small plan
generates code.
"""

import copy

import pytest
import torch

from dsd_fast.unet import UNetProgram
from dsd_fast.unet.request import bucket, full_bucket, pad
from dsd_fast.unet.stream import HEADROOM
from tests.tiny import tiny_pipeline
from tests.unet.compiled import FIRST_VIT, SCORE, TOKENS, Case, graphs, load_lora, run, same, small_unet

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# SDXL has the linear projections and heads per level of SD 2.1.
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_kind_of_answer_equals_the_plain_run(family):
    case = Case(family)
    scores = case.program.score_ids
    plain, compiled = case.plans(
        features=["unet-in", "mid-vit-block0-self-k", f"{scores[-1]}-map", "up-level0-upsampler-out"],
        scores=scores[1:],
        maps=scores[:1],
        noise_pred=True,
        pool=0.5,
    )
    bias = torch.randn(3, TOKENS, generator=torch.Generator().manual_seed(3))
    request = case.request(lengths=[TOKENS, 4, 7], key_bias=bias, score_mask=bias > -1) | {"map_tokens": [0, 4]}
    with torch.no_grad():
        want = run(plain, request)
        same(run(compiled, request), want)
        out = plain.empty_output(5, 16, 16, tokens=TOKENS, map_tokens=2)
        assert run(compiled, request | {"out": out}) is out
    same(out, want)


@pytest.mark.newest
def test_generated_code_is_as_exact_as_plain_torch():
    case, exact = Case("sd15", backend="inductor"), Case("sd15", dtype=torch.float64)
    asked = {"features": [FIRST_VIT], "scores": [SCORE]}
    plain, compiled = case.plans(**asked)
    truth = exact.program.plan(**asked)
    request = case.request()
    wide = request | {name: request[name].double() for name in ("latents", "states")}
    with torch.no_grad():
        answers = [
            dict(run(plan, given).tensors()) for plan, given in ((truth, wide), (plain, request), (compiled, request))
        ]
    for name, true in answers[0].items():
        naive, error = (float((x[name].double() - true).abs().max()) for x in answers[1:])
        assert error <= 2 * naive + float(true.abs().max()) * torch.finfo(torch.float32).eps


def test_counts_are_rounded_up_by_less_than_a_fifth_and_up_to_16_to_powers_of_two():
    assert [bucket(n) for n in range(18)] == [0, 1, 2, 4, 4, 8, 8, 8, 8] + [16] * 8 + [20]
    sizes = sorted({bucket(n) for n in range(17, 1025)})
    assert sizes[:9] == [20, 24, 28, 32, 40, 48, 56, 64, 80]
    assert all(n <= bucket(n) < 1.25 * n and bucket(bucket(n)) == bucket(n) for n in range(17, 1025))
    image = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    assert pad(image, 4).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pad(image, 5)[3:], image[[0, 0]])


def test_nothing_is_compiled_again_inside_a_bucket():
    case = Case("sd15", backend="eager")
    plain, compiled = case.plans(scores=[SCORE], features=["down-level0-downsampler-out"])
    with torch.no_grad():
        run(compiled, case.request(2, 3, 5))
        before = graphs()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for latents, texts, rows in ((2, 4, 8), (2, 3, 6), (2, 4, 5), (2, 3, 7)):
                request = case.request(latents, texts, rows)
                same(run(compiled, request), run(plain, request))
        assert graphs() == before
        run(compiled, case.request(2, 3, 9))
        assert graphs() > before


def test_blocks_of_equal_structure_are_compiled_once():
    counts = []
    for layers in (1, 3):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        case = Case("sdxl", small_unet("sdxl", layers), backend="eager")
        with torch.no_grad():
            run(case.plans(features=["down-level1-repeat0-vit-out"])[1], case.request())
        counts.append(graphs())
    assert counts[0] == counts[1]


def test_micro_batches_of_a_stream_fill_buckets():
    case = Case("sd15", backend="eager")
    plain, compiled = case.plans(scores=[SCORE])
    request = case.request(7, 3, 17)
    states, options = request.pop("states"), request.pop("text")
    with torch.no_grad():
        text = plain.encode_text(states, **options)
        budget = text.nbytes + HEADROOM["cpu"] * plain.run_bytes(7, 16, 16, TOKENS)
        sizes = {}
        for plan in (plain, compiled):
            batches = list(plan.stream(text=text, **request, memory_budget=budget))
            sizes[plan.runtime] = [len(rows) for rows, _ in batches]
    assert sizes == {None: [7, 7, 3], "inductor": [4, 4, 4, 4, 1]}
    assert [full_bucket(n) for n in (1, 3, 15, 16, 19, 31, 63)] == [1, 2, 8, 16, 16, 28, 56]
    assert all(bucket(full_bucket(n)) == full_bucket(n) <= n for n in range(1, 1025))


@pytest.mark.newest
def test_rows_without_indices_and_no_rows_at_all():
    case = Case("sd15")
    plain, compiled = case.plans(features=[FIRST_VIT])
    with torch.no_grad():
        request = case.request(3, 3) | {"latent_index": None, "text_index": None}
        same(run(compiled, request), run(plain, request))
        none = run(compiled, case.request(rows=0))
    assert none.features[FIRST_VIT].shape == (0, 16, 16, 16)


def test_residuals_of_a_controlnet():
    case = Case("sd15", backend="eager")
    plain, compiled = case.plans(noise_pred=True)
    g = torch.Generator().manual_seed(4)
    shapes = [(16, 16, 16), (16, 16, 16), (16, 8, 8), (32, 8, 8)]
    down = [torch.randn(5, *shape, generator=g) for shape in shapes]
    request = case.request() | {"residuals": (down, torch.randn(5, 32, 8, 8, generator=g))}
    with torch.no_grad():
        same(run(compiled, request), run(plain, request))


def test_gradients_of_texts_latents_and_weights_flow():
    case = Case("sd15", dtype=torch.float64)
    case.unet.requires_grad_(True)
    plain, compiled = case.plans(noise_pred=True, scores=[SCORE])
    request = case.request()
    leaves = [request["latents"].requires_grad_(), request["states"].requires_grad_(), *case.unet.parameters()]
    grads = []
    for plan in (plain, compiled):
        out = run(plan, request)
        grads.append(torch.autograd.grad(out.noise_pred.square().sum() + out.scores[SCORE].sum(), leaves))
    scale = max(float(g.abs().max()) for g in grads[0])
    for a, b in zip(*grads, strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * scale


class Adapted(Case):
    """SD 1.5 with the LoRAs "a" and "b"."""

    def __init__(self, tmp_path):
        self.pipe = tiny_pipeline("sd15")
        super().__init__("sd15", self.pipe.unet.requires_grad_(False), backend="eager")
        self.plain, self.compiled = self.plans(features=[FIRST_VIT])
        self.folder = tmp_path

    def load(self, name, seed):
        load_lora(self.pipe, self.folder / name, name, seed)

    def check(self):
        """The features, equal under both plans."""
        with torch.no_grad():
            want = run(self.plain, self.request())
            same(run(self.compiled, self.request()), want)
        return want.features[FIRST_VIT]


def test_adapters_that_come_and_go_after_compiling_count(tmp_path):
    case = Adapted(tmp_path)
    seen = [case.check()]
    case.load("a", 1)
    case.load("b", 2)
    for change in (
        lambda: case.pipe.set_adapters("a"),
        lambda: case.pipe.set_adapters(["a", "b"], [0.3, 1.5]),
        case.pipe.disable_lora,
        case.pipe.enable_lora,
        lambda: case.pipe.fuse_lora(adapter_names=["a"]),
        case.pipe.unfuse_lora,
        case.pipe.unload_lora_weights,
    ):
        change()
        seen.append(case.check())
    assert float((seen[0] - seen[1]).abs().max()) > 1e-3
    assert float((seen[1] - seen[2]).abs().max()) > 1e-3


def test_an_adapter_of_ever_another_strength_never_meets_the_limit_of_compilations(tmp_path):
    case = Adapted(tmp_path)
    case.load("a", 1)
    with torch._dynamo.config.patch(recompile_limit=2):
        for strength in (1.0, 0.8, 0.6, 0.4):
            case.pipe.set_adapters("a", strength)
            case.check()


def test_texts_are_padded_once():
    case = Case("sd15")
    plan = case.program.plan(scores=[SCORE])
    request = case.request()
    text = plan.encode_text(request["states"], lengths=[1, 2, 3])
    padded = text.padded(4)
    assert padded is text.padded(4)
    assert text.padded(3) is text
    assert padded.lengths.tolist() == [1, 2, 3, 1]
    assert torch.equal(padded.k[SCORE], text.k[SCORE][[0, 1, 2, 0]])
    text.k[SCORE].mul_(2)
    assert torch.equal(text.padded(4).k[SCORE], text.k[SCORE][[0, 1, 2, 0]])
    # A slice has padding of its own, and what wants gradients has a graph of its own.
    assert len(text[:2].padded(4).k[SCORE]) == 4
    wanting = plan.encode_text(request["states"].requires_grad_())
    assert wanting.padded(4) is not wanting.padded(4)


def test_other_runtimes_are_refused_by_name():
    plan = Case("sd15").program.plan(noise_pred=True)
    with pytest.raises(ValueError, match="runtime: got 'onnx', expected 'inductor' or 'cudagraph'"):
        plan.compile("onnx")
    with pytest.raises(ValueError, match="runtime: 'cudagraph' needs a network on a CUDA device, this one is on cpu"):
        plan.compile("cudagraph")


def test_a_deep_copy_of_a_compiled_plan_runs_a_network_of_its_own():
    case = Case("sd15", backend="eager")
    plain, compiled = case.plans(scores=[SCORE], pool=0.5)
    with torch.no_grad():
        want = run(compiled, case.request())
        together = copy.deepcopy({"plan": compiled, "unet": case.unet})
        copied = together["plan"]
        assert copied.program.unet is together["unet"] is not case.unet
        assert (copied.runtime, copied.scores, copied.pool) == ("inductor", (SCORE,), 0.5)
        case.unet.conv_in.weight.mul_(2.0)
        same(run(copied, case.request()), want)
        copied.program.unet.conv_in.weight.mul_(0.5)
        same(
            run(copied, case.request()),
            run(UNetProgram(copied.program.unet).plan(scores=[SCORE], pool=0.5), case.request()),
        )
        same(run(compiled, case.request()), run(plain, case.request()))
