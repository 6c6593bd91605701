"""Plans that enter the network with a kept activation: stock diffusers with that activation put in the same place."""

import copy
import re
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from dsd_fast.unet import UNetProgram
from dsd_fast.unet.cudagraph import CudaGraph
from dsd_fast.unet.stream import HEADROOM
from tests.memory import peak_bytes
from tests.tiny import CROSS_ATTENTION_DIM, FAMILIES, POOLED_DIM, SHAPES, put_adapter, tiny_unet
from tests.unet.compiled import TOKENS, Case, run, same
from tests.unet.test_replay import Again

SMALL = "up-level1-repeat0-vit-out"
# Of the shapes that are built as another but for their widths and embeddings, the first and the last entry.
ALIKE = ("sd21", "bk-sdm-base", "lcm", "lcm-sdxl")


def module_of(unet, name):
    """The module whose output an id's value is."""
    if name.startswith("mid"):
        return unet.mid_block
    level, repeat, kind = re.fullmatch(r"up-level(\d)-(?:repeat(\d)-)?(\w+)-out", name).groups()
    block = unet.up_blocks[int(level)]
    return (
        block.upsamplers[0] if repeat is None else (block.resnets if kind == "res" else block.attentions)[int(repeat)]
    )


def stock(unet, name, kept, *arguments, **options):
    """The stock network's output with ``kept`` in the place of that module's."""
    hook = module_of(unet, name).register_forward_hook(
        lambda module, given, output: (kept,) if isinstance(output, tuple) else kept
    )
    try:
        return unet(*arguments, **options).sample
    finally:
        hook.remove()


class Rows:
    """Two latents, two texts, three rows; the activations kept of other latents at other timesteps."""

    def __init__(self, shape):
        self.index, self.times = {"latent_index": [1, 0, 1], "text_index": [0, 1, 1]}, torch.tensor([700, 20])
        g = torch.Generator().manual_seed(0)
        family = SHAPES.get(shape, (shape,))[0]
        self.unet = tiny_unet(shape)
        self.program = UNetProgram(self.unet)
        self.latents, self.before = torch.randn(2, 2, 4, 16, 16, generator=g)
        self.states = torch.randn(2, TOKENS, CROSS_ATTENTION_DIM[family], generator=g)
        self.pooled = self.ids = None
        if family == "sdxl":
            self.pooled = torch.randn(2, POOLED_DIM, generator=g)
            self.ids = torch.randint(0, 64, (2, 6), generator=g).float()
        self.whole = self.program.plan(noise_pred=True, features=self.program.entries)
        with torch.no_grad():
            self.text = self.whole.encode_text(self.states, self.pooled)
            self.kept = self.whole.run(self.before, [800, 60], self.text, **self.index, time_ids=self.ids).features
        *down, mid = (torch.randn(3, *shape, generator=g) for shape in self.program.residual_shapes(16, 16))
        self.residuals = (down, mid)

    def run(self, plan, **options):
        return plan.run(self.latents, self.times, self.text, **self.index, time_ids=self.ids, **options)

    def stock(self, name, residuals=None):
        latents, texts = self.index["latent_index"], self.index["text_index"]
        options = {}
        if self.ids is not None:
            options["added_cond_kwargs"] = {"text_embeds": self.pooled[texts], "time_ids": self.ids[latents]}
        if residuals is not None:
            options["down_block_additional_residuals"], options["mid_block_additional_residual"] = residuals
        arguments = (self.latents[latents], self.times[latents], self.states[texts])
        return stock(self.unet, name, self.kept[name], *arguments, **options)


@pytest.mark.parametrize("shape", [*FAMILIES, *SHAPES])
@torch.no_grad()
def test_every_entry_is_stock_diffusers_with_the_activation_put_there(shape):
    rows = Rows(shape)
    program, here = rows.program, rows.run(rows.whole)
    pushes = sum(1 for step in program.steps if step.pushes)
    # Without a middle block nothing lies between the last connection and the first that is used.
    assert len(program.entries) == pushes - (rows.unet.mid_block is None)
    costs = [rows.whole.flops(latents=2, texts=2, rows=3, height=16, width=16, tokens=TOKENS)]
    last = len(program.entries) - 1
    for number in (last, 0) if shape in ALIKE else range(last, -1, -1):
        name = program.entries[number]
        plan = program.plan(noise_pred=True, enter=name)
        assert sum(step.pops for step in plan.steps) == number + 1 == len(plan.kept_skips)
        # The activation of the step itself gives the whole network's output.
        assert torch.equal(rows.run(plan, kept=here.features[name]).noise_pred, here.noise_pred)
        got, want = rows.run(plan, kept=rows.kept[name]).noise_pred, rows.stock(name)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), name
        costs.append(plan.flops(latents=2, texts=2, rows=3, height=16, width=16, tokens=TOKENS))
    assert costs == sorted(costs, reverse=True)
    assert (want - here.noise_pred).abs().max() > 0.01 * want.abs().max()


@pytest.mark.parametrize("shape", ["sd15", "sdxl", "bk-sdm-small"])
@torch.no_grad()
def test_residuals_of_the_connections_that_are_used_are_added(shape):
    rows = Rows(shape)
    for name in (rows.program.entries[1], rows.program.entries[-1]):
        plan = rows.program.plan(noise_pred=True, enter=name)
        got, want = rows.run(plan, kept=rows.kept[name], residuals=rows.residuals).noise_pred, rows.stock(name)
        assert (got - want).abs().max() > 0.01 * want.abs().max()
        want = rows.stock(name, rows.residuals)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), name


@torch.no_grad()
def test_flops_are_those_of_the_modules_that_run():
    ran = {
        ("sd15", 0): ["conv_in", "time_embedding", "up_blocks.3.resnets.2", "up_blocks.3.attentions.2", "conv_out"],
        ("sdxl", 1): [
            *("conv_in", "time_embedding", "add_embedding", "down_blocks.0.resnets.0"),
            *("up_blocks.2.resnets.1", "up_blocks.2.resnets.2", "conv_out"),
        ],
    }
    for (shape, number), modules in ran.items():
        rows = Rows(shape)
        # Attention that is written out, which the counter sees whole.
        rows.unet.set_attn_processor(AttnProcessor())
        with FlopCounterMode(display=False) as counter:
            rows.stock(rows.program.entries[number])
        counts = counter.get_flop_counts()
        want = sum(sum(counts[f"UNet2DConditionModel.{name}"].values()) for name in modules)
        plan = rows.program.plan(noise_pred=True, enter=rows.program.entries[number])
        # Of three rows, each with a latent and a text of its own.
        assert plan.flops(latents=3, texts=3, rows=3, height=16, width=16, tokens=TOKENS) == want
        # The first convolution (SDXL's first residual block's too) once for each latent, all else for each row.
        one, three = (
            plan.flops_by_step(latents=1, texts=1, rows=rows, height=16, width=16, tokens=TOKENS) for rows in (1, 3)
        )
        times = [three[step.name] // one[step.name] for step in plan.steps if one[step.name]]
        shared = 2 if shape == "sdxl" else 1
        assert times == [1] * shared + [3] * (len(times) - shared)


@torch.no_grad()
def test_memory_is_what_such_runs_hold():
    rows = Rows("sd15")
    count, size = 12, 32
    g = torch.Generator().manual_seed(0)
    latents, states = torch.randn(count, 4, size, size, generator=g), torch.randn(2, 77, 24, generator=g)
    options = {"text_index": torch.arange(count) % 2}
    whole = rows.program.plan(noise_pred=True)
    for name in (rows.program.entries[0], rows.program.entries[-1]):
        plan = rows.program.plan(noise_pred=True, enter=name)
        text = plan.encode_text(states)
        kept = torch.randn(count, *plan.entry.shape(rows.program.sizes(size, size)[plan.entry.level], 77), generator=g)
        measured = peak_bytes(lambda plan=plan, text=text, kept=kept: plan.run(latents, 5, text, kept=kept, **options))
        assert measured <= plan.run_bytes(count, size, size, 77) <= 3 * measured
        assert plan.run_bytes(count, size, size, 77) <= 1.1 * whole.run_bytes(count, size, size, 77)


def entered(case, request):
    """The request to a plan that enters: its own, compiled, and what is kept for it."""
    with torch.no_grad():
        before = request | {"latents": request["latents"] * 0.9}
        kept = run(case.program.plan(features=[SMALL]), before).features[SMALL]
    return request | {"kept": kept}


@torch.no_grad()
def test_micro_batches_compiled_runs_and_recordings_answer_as_plain_runs(fresh_dynamo):
    case = Case("sd15", backend="eager")
    plan, compiled = case.plans(noise_pred=True, enter=SMALL)
    request = entered(case, case.request(3, 2, 7))
    want = run(plan, request)
    same(run(compiled, request), want)
    compiled._runtime = CudaGraph(Again())
    for given in (request, entered(case, case.request(3, 2, 5)), request):
        same(run(compiled, given), run(plan, given))
    rest = dict(request)
    text = plan.encode_text(rest.pop("states"))
    rest.pop("text")
    budget = text.nbytes + HEADROOM["cpu"] * plan.run_bytes(2, 16, 16, TOKENS)
    out = plan.empty_output(7, 16, 16, tokens=TOKENS)
    plan.stream(rest.pop("latents"), rest.pop("timesteps"), text, **rest, out=out, memory_budget=budget)
    same(out, want)
    # Without the whole network's keys.
    assert text.k.keys() == {name for name in case.program.score_ids if name.startswith("up-level1-repeat1")}


@torch.no_grad()
def test_copies_pickles_and_adapters():
    rows = Rows("sd15")
    put_adapter(rows.unet, "dora")
    name = rows.program.entries[0]
    bare, adapted = (rows.program.plan(noise_pred=True, enter=name, adapter=which) for which in ((), "x"))
    results = []
    for plan in (bare, adapted):
        rows.text = plan.encode_text(rows.states)
        results.append(rows.run(plan, kept=rows.kept[name]).noise_pred)
        for other in (copy.deepcopy(plan), ForkingPickler.loads(ForkingPickler.dumps(plan))):
            assert other.enter == name
            rows.text = other.encode_text(rows.states)
            assert torch.equal(rows.run(other, kept=rows.kept[name]).noise_pred, results[-1])
    want = rows.stock(name)
    assert (results[1] - want).abs().max() <= 1e-5 * want.abs().max()
    assert (results[0] - want).abs().max() > 1e-3 * want.abs().max()


def test_gradients_reach_what_is_kept_with_checkpoints_as_without():
    case = Case("sd15")
    plan = case.program.plan(noise_pred=True, enter=SMALL)
    gradients = []
    for checkpoint in (False, True):
        request = entered(case, case.request(2, 2, 3))
        kept = request["kept"].requires_grad_()
        out = run(plan, request | {"checkpoint": checkpoint})
        gradients += torch.autograd.grad(out.noise_pred.square().sum(), kept)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


def test_taps_of_the_steps_that_run_and_refusals_of_the_others():
    rows = Rows("sd15")
    name, plan = rows.program.entries[2], rows.program.plan
    tapped = plan(features=["down-level0-repeat0-vit-out", "up-level3-repeat1-vit-out"], enter=name)
    assert tapped.steps[-1].name == "up-level3-repeat1-vit-out"
    with torch.no_grad():
        got, want = (rows.run(each, kept=rows.kept[name]) for each in (tapped, plan(noise_pred=True, enter=name)))
        here = rows.run(plan(features=tapped.features, noise_pred=True))
    assert want.noise_pred.shape == here.noise_pred.shape
    assert torch.equal(got.features[tapped.features[0]], here.features[tapped.features[0]])
    assert not torch.equal(got.features[tapped.features[1]], here.features[tapped.features[1]])
    for asked, message in (
        ({"features": ["mid-vit-out"], "noise_pred": True}, f"features: 'mid-vit-out' is not computed .* at '{name}'"),
        ({"features": [name], "noise_pred": True}, f"features: '{name}' is not computed"),
        ({"scores": ["up-level1-repeat0-vit-block0-cross"]}, "scores: 'up-level1-repeat0-vit-block0-cross' is not"),
        ({"features": ["unet-after-conv-in"]}, f"enter: nothing is asked for that comes after '{name}'"),
        ({"noise_pred": True, "enter": "up-level2-repeat2-vit-out"}, "enter: unknown id 'up-level2-repeat2-vit-out'"),
        ({"noise_pred": True, "enter": "down-level3-repeat1-res-out"}, "enter: unknown id 'down-level3"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(**{"enter": name} | asked)


@pytest.mark.parametrize("call", ["run", "stream"])
def test_kept_activations_that_do_not_fit_are_refused(call):
    rows = Rows("sd15")
    name = rows.program.entries[0]
    kept, shape = rows.kept[name], r"\(3, 16, 16, 16\): 'up-level3-repeat1-vit-out' of each requested row"
    plan = rows.program.plan(noise_pred=True, enter=name)
    for entering, given, message in (
        (plan, None, f"kept: got None, expected {shape}"),
        (plan, kept[:2], rf"kept: got \(2, 16, 16, 16\), expected {shape}"),
        (plan, kept[:, :8], rf"kept: got \(3, 8, 16, 16\), expected {shape}"),
        (plan, kept.double(), "kept: got torch.float64 on cpu, expected the network's torch.float32"),
        (rows.whole, kept, "kept: given, expected None: this plan enters the network at its start"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(entering, call)(rows.latents, 5, rows.text, **rows.index, kept=given)
    with pytest.raises(ValueError, match="text: needed by step 'up-level3-repeat2-vit-block0-cross'"):
        getattr(plan, call)(rows.latents, 5, None, latent_index=[1, 0, 1], kept=kept)
