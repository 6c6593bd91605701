"""Gradient checkpointing: the gradients of the plain run, in the memory of what travels between regions."""

import weakref
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsd_fast.kernels.common import backend
from tests.unet.compiled import FIRST_VIT, SCORE, TOLERANCE, Case, run, same, small_unet

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


class Adapted(Case):
    """A network with the LoRA "a" of all attention projections, and "b" if asked; "a" is active."""

    def __init__(self, family, dtype=torch.float32, dropout=0.0, names="a", **options):
        super().__init__(family, dtype=dtype, **options)
        torch.manual_seed(0)
        for name in names:
            self.unet.add_adapter(
                LoraConfig(r=2, target_modules=PROJECTIONS, lora_dropout=dropout, init_lora_weights=False), name
            )
        self.unet.set_adapter("a")
        self.unet.to(dtype).train(dropout > 0)
        self.leaves = [p for n, p in self.unet.named_parameters() if ".lora_" in n]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def plan(self, adapter=None):
        """Everything that can be asked of a region."""
        scores = self.program.score_ids
        return self.program.plan(
            features=["mid-vit-block0-self-k", f"{scores[0]}-map", "up-level0-upsampler-out"],
            scores=scores[:2],
            maps=scores[1:2],
            noise_pred=True,
            pool=0.5,
            adapter=adapter,
        )

    def answer(self, plan, **options):
        """What the plan answers, and all that gradients are wanted of."""
        request = self.request() | {"map_tokens": [0, 4]} | options
        leaves = [request[name].requires_grad_() for name in ("latents", "states")]
        return run(plan, request), [*leaves, *self.leaves]


def gradients(out, leaves):
    total = sum(value.square().sum() for _, value in out.tensors())
    return torch.autograd.grad(total, leaves, allow_unused=True)


def equal(got, want):
    assert len(got) == len(want)
    assert any(x is not None and float(x.abs().max()) > 0 for x in want)
    for x, y in zip(got, want, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


def compared(case, plan, **options):
    want, leaves = case.answer(plan, **options)
    got, again = case.answer(plan, checkpoint=True, **options)
    for (name, x), (_, y) in zip(got.tensors(), want.tensors(), strict=True):
        assert torch.equal(x, y), name
        assert x.stride() == y.stride(), name
    equal(gradients(got, again), gradients(want, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_gradients_are_those_of_the_plain_run_bit_for_bit(family, dtype):
    case = Adapted(family, dtype)
    compared(case, case.plan())


def test_gradients_of_a_controlnets_residuals():
    case = Adapted("sd15")
    g = torch.Generator().manual_seed(4)
    shapes = [(16, 16, 16), (16, 16, 16), (16, 8, 8), (32, 8, 8), (32, 8, 8)]
    *down, mid = (torch.randn(5, *shape, generator=g).requires_grad_() for shape in shapes)
    case.leaves += [*down, mid]
    compared(case, case.plan(), residuals=(down, mid))


def test_dropout_drops_the_same_again():
    case = Adapted("sd15", dropout=0.5)
    plan, grads = case.plan(), []
    for seed, checkpoint in ((0, False), (0, True), (1, True)):
        torch.manual_seed(seed)
        out, leaves = case.answer(plan, checkpoint=checkpoint)
        # What is drawn between the run and its backward pass changes nothing.
        torch.rand(1)
        grads.append(gradients(out, leaves))
    equal(grads[1], grads[0])
    assert not torch.equal(grads[2][0], grads[0][0])


def test_an_adapter_of_the_plan_is_active_again_in_the_backward_pass():
    case = Adapted("sd15", names="ab")
    plan = case.plan(adapter="a")
    case.unet.set_adapters("b")
    for leaf in case.leaves:
        leaf.requires_grad_()
    compared(case, plan)
    assert case.unet.active_adapters() == ["b"]


def test_adapters_of_the_network_are_set_again_as_they_were_at_the_call():
    case = Adapted("sd15", names="ab")
    plan = case.plan()
    case.unet.set_adapters(["a", "b"], [0.3, 1.5])
    want = gradients(*case.answer(plan))
    out, leaves = case.answer(plan, checkpoint=True)
    case.unet.set_adapters("b", 0.7)
    for leaf in case.leaves:
        leaf.requires_grad_()
    equal(gradients(out, leaves), want)
    layer = case.program.attention(SCORE).to_k
    assert layer.active_adapters == ["b"]
    assert layer.scaling["b"] == 0.7 * layer.lora_alpha["b"] / layer.r["b"]


def test_autocast_and_forced_implementations_count_again_in_the_backward_pass():
    case = Adapted("sd15")
    plan = case.plan()
    for context in (lambda: torch.autocast("cpu", torch.bfloat16), lambda: backend.force("reference")):
        grads = []
        for checkpoint in (False, True):
            with context():
                out, leaves = case.answer(plan, checkpoint=checkpoint)
            grads.append(gradients(out, leaves))
        equal(*grads)


def test_modules_run_twice_and_those_that_no_gradient_passes_once():
    case = Adapted("sd15")
    counts = {}
    watched = {
        "before": case.unet.conv_in,
        "first": case.program.attention(SCORE).to_q,
        "later": case.unet.up_blocks[1].resnets[0].conv1,
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
    request = case.request()
    for checkpoint, grad, expected in (
        (False, True, {"before": 1, "first": 1, "later": 1}),
        (True, True, {"before": 1, "first": 2, "later": 2}),
        (True, False, {"before": 1, "first": 1, "later": 1}),
    ):
        counts.clear()
        with torch.set_grad_enabled(grad):
            out = run(case.program.plan(noise_pred=True), request | {"checkpoint": checkpoint})
            if grad:
                gradients(out, case.leaves)
        assert counts == expected
    # diffusers' own switch asks for the same.
    case.unet.enable_gradient_checkpointing()
    counts.clear()
    gradients(run(case.program.plan(noise_pred=True), request), case.leaves)
    assert counts == {"before": 1, "first": 2, "later": 2}


def saved_bytes(call):
    """Bytes that autograd keeps for the backward pass, each memory counted once."""
    kept = {}

    def pack(x):
        # The storage itself, so that its address is not given to another.
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = call()
    return sum(storage.nbytes() for storage in kept.values()), out


def test_what_is_kept_is_what_travels_between_regions():
    case = Case("sd15")
    plan = case.program.plan(noise_pred=True)
    request = case.request(3, 3, 3) | {"latent_index": None, "text_index": None}
    request["latents"].requires_grad_()
    sizes, tokens = case.program.sizes(16, 16), request["states"].shape[1]

    def nbytes(step):
        return 4 * 3 * torch.Size(step.shape(sizes[step.level], tokens)).numel()

    # The value of each region's last step, and what all regions read. A transformer's projection in has no id; the
    # blocks after it answer in its shape.
    shaped = [step for step, _ in (region.steps[-1] for region in plan.regions) if step.shape is not None]
    entering = [step for step in plan.steps if step.name.endswith("-vit-block0-out")]
    with torch.no_grad():
        text = plan.encode_text(request["states"])
    embedding = 4 * 3 * case.unet.time_embedding.linear_2.out_features
    travels = sum(map(nbytes, shaped + entering)) + request["latents"].nbytes + embedding + text.nbytes
    # Inside blocks, at least the operands of the attentions and of the gates are kept for their products.
    inside = [step for step in plan.steps if step.name.endswith(("self-q", "self-k", "self-v", "cross-q", "ffn-inner"))]

    plain, _ = saved_bytes(lambda: run(plan, request))
    kept, _ = saved_bytes(lambda: run(plan, request | {"checkpoint": True}))
    assert kept <= travels
    assert plain - kept >= sum(map(nbytes, inside))
    with torch.no_grad():
        assert saved_bytes(lambda: run(plan, request | {"checkpoint": True}))[0] == 0


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once inside the block, without those of tensors that were there before."""

    def __init__(self, before):
        super().__init__()
        self.alive, self.peak = 0, 0
        self.known = weakref.WeakSet(value.untyped_storage() for value in before)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.untyped_storage() not in self.known:
                storage = value.untyped_storage()
                self.known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def _free(self, nbytes):
        self.alive -= nbytes


def test_a_further_block_adds_to_the_peak_of_a_step_what_travels_and_not_its_activations():
    peaks = {}
    for layers in (2, 6):
        case = Case("sdxl", small_unet("sdxl", layers))
        plan = case.program.plan(features=["down-level1-repeat0-vit-out"])
        request = case.request(3, 3, 3) | {"latent_index": None, "text_index": None}
        request["latents"].requires_grad_()
        request["text"] = plan.encode_text(request.pop("states"), **request["text"])
        for checkpoint in (False, True):
            with Peak([*case.unet.parameters(), *request["text"].tensors()]) as peak:
                out = plan.run(**request, checkpoint=checkpoint)
                out.features["down-level1-repeat0-vit-out"].square().sum().backward()
            peaks[layers, checkpoint] = peak.peak
    # (B, L, C) float32 from block to block.
    travels = 4 * 3 * (8 * 8) * 32
    assert peaks[6, True] - peaks[2, True] <= 4 * travels
    # The attentions' operands alone are q, k, v and cross-q, each as large.
    assert peaks[6, False] - peaks[2, False] >= 4 * 4 * travels


def test_of_regions_that_no_gradient_passes_nothing_is_kept():
    case = Case("sd15")
    plan = case.program.plan(noise_pred=True)
    request = case.request()
    alive = []
    for checkpoint in (False, True):
        with Peak([*case.unet.parameters(), request["latents"], request["states"]]) as peak:
            out = run(plan, request | {"checkpoint": checkpoint})
        assert not out.noise_pred.requires_grad
        alive.append(peak.alive)
    assert alive[0] == alive[1]


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_regions_are_checkpointed():
    case = Adapted("sd15", names="ab")
    plain, compiled = case.plans(features=[FIRST_VIT], adapter="a")
    case.unet.set_adapters("b")
    for leaf in case.leaves:
        leaf.requires_grad_()
    out, leaves = case.answer(plain)
    want = gradients(out, leaves)
    kept = {}
    for checkpoint in (False, True):
        kept[checkpoint], (got, leaves) = saved_bytes(partial(case.answer, compiled, checkpoint=checkpoint))
        same(got, out)
        scale = max(float(y.abs().max()) for y in want if y is not None)
        for x, y in zip(gradients(got, leaves), want, strict=True):
            assert (x is None) == (y is None)
            # As far as a bucket's batch size may take convolutions and sums from the plain run's.
            assert x is None or float((x - y).abs().max()) <= TOLERANCE * scale
    assert kept[True] < kept[False]
    with torch._dynamo.config.patch(error_on_recompile=True):
        gradients(*case.answer(compiled, checkpoint=True))


def test_what_is_written_to_before_the_backward_pass_is_an_error():
    case = Adapted("sd15")
    plan = case.plan()
    out, leaves = case.answer(plan, checkpoint=True)
    with torch.no_grad():
        case.leaves[0].add_(1)
    with pytest.raises(RuntimeError, match="checkpoint: a weight was written to, or an adapter added"):
        gradients(out, leaves)
    request = case.request() | {"map_tokens": [0, 4]}
    text = plan.encode_text(request.pop("states"), **request.pop("text"))
    out = plan.run(text=text, **request, checkpoint=True)
    with torch.no_grad():
        text.k[SCORE].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(out, case.leaves)
    out, leaves = case.answer(plan, checkpoint=True)
    case.unet.fuse_lora()
    with pytest.raises(RuntimeError, match="checkpoint: a weight was written to, or an adapter added"):
        gradients(out, leaves)


def test_a_run_that_something_else_traces_is_not_checkpointed():
    case = Case("sd15")
    plan = case.program.plan(scores=[SCORE])
    request = case.request()
    text = plan.encode_text(request["states"])

    @torch.compile(backend="eager", fullgraph=True)
    def traced(latents):
        return plan.run(latents, 3, text, text_index=[0, 1], checkpoint=True).scores[SCORE]

    with pytest.raises(Exception, match=r"checkpoint: got True while torch.compile or torch.export traces the run"):
        traced(request["latents"])
