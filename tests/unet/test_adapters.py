"""Adapters through PEFT: equal to diffusers, and active only during the calls of the plan they belong to."""

import copy
import threading
import warnings
from multiprocessing.reduction import ForkingPickler

import peft
import pytest
import torch

from dsd_fast.jobs.ids import all_tensors
from dsd_fast.models.tuners import tuner_layers
from dsd_fast.unet import UNetProgram
from dsd_fast.unet.adapters import acting_tensors, stack, strengths_by_layer
from dsd_fast.unet.refusals import UnsupportedNetworkError
from dsd_fast.unet.stream import HEADROOM
from tests.tiny import ADAPTERS, CROSS_ATTENTION_DIM, POOLED_DIM, load_tiny_lora, put_adapter, tiny_pipeline, tiny_unet


class Adapted:
    """A pipeline with the LoRA "a", and "b" of another seed, loaded before or after the program is made."""

    def __init__(self, family, tmp_path, before=True):
        g = torch.Generator().manual_seed(0)
        self.pipe = tiny_pipeline(family)
        self.unet = self.pipe.unet
        if not before:
            self.program = UNetProgram(self.unet)
        for name, seed in (("a", 1), ("b", 2)):
            load_tiny_lora(self.pipe, family, tmp_path / name, seed=seed, adapter_name=name)
        if before:
            self.program = UNetProgram(self.unet)
        self.latents = torch.randn(2, 4, 16, 16, generator=g)
        self.states = torch.randn(2, 5, CROSS_ATTENTION_DIM[family], generator=g)
        self.pooled = torch.randn(2, POOLED_DIM, generator=g) if family == "sdxl" else None
        self.ids = torch.ones(6) if family == "sdxl" else None

    def diffusers(self):
        added = None if self.pooled is None else {"text_embeds": self.pooled, "time_ids": self.ids.expand(2, 6)}
        with torch.no_grad():
            return self.unet(self.latents, 300, self.states, added_cond_kwargs=added).sample

    def ours(self, plan):
        with torch.no_grad():
            text = plan.encode_text(self.states, pooled=self.pooled)
            return plan.run(self.latents, 300, text, time_ids=self.ids).noise_pred

    def state(self):
        layers = [m for m in self.unet.modules() if hasattr(m, "lora_A")]
        return [(m.active_adapters, m.disable_adapters) for m in layers], [
            p.requires_grad for p in self.unet.parameters()
        ]


def close(got, want):
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize(
    ("family", "before"),
    [("sd15", True), ("sd21", True), ("sdxl", True), ("sd15", False)],
    ids=lambda x: x if isinstance(x, str) else "loaded before" if x else "loaded after",
)
@pytest.mark.newest
def test_the_networks_own_adapters_count_as_in_diffusers(family, before, tmp_path):
    case = Adapted(family, tmp_path, before)
    plan = case.program.plan(noise_pred=True)
    seen = []
    for change in (
        lambda: case.pipe.set_adapters("a"),
        lambda: case.pipe.set_adapters(["a", "b"], [0.3, 1.5]),
        case.pipe.disable_lora,
        case.pipe.enable_lora,
        case.pipe.fuse_lora,
        case.pipe.unfuse_lora,
        case.pipe.unload_lora_weights,
    ):
        change()
        seen.append(case.diffusers())
        close(case.ours(plan), seen[-1])
    assert float((seen[0] - seen[1]).abs().max()) > 1e-3
    assert float((seen[0] - seen[2]).abs().max()) > 1e-3


def test_an_adapter_is_active_only_during_its_plans_calls(tmp_path):
    case = Adapted("sd15", tmp_path)
    want = {}
    for name in ("a", "b"):
        case.pipe.set_adapters(name)
        want[name] = case.diffusers()
    case.pipe.disable_lora()
    want[()] = case.diffusers()
    case.pipe.enable_lora()
    case.pipe.set_adapters("b")
    before = case.state()
    for name, expected in want.items():
        close(case.ours(case.program.plan(noise_pred=True, adapter=name)), expected)
        assert case.state() == before
    plan = case.program.plan(noise_pred=True, adapter="a")
    with pytest.raises(ValueError, match="timesteps"):
        plan.run(case.latents, [1, 2, 3], plan.encode_text(case.states))
    assert case.state() == before


def test_a_text_of_another_adapter_is_refused(tmp_path):
    case = Adapted("sd15", tmp_path)
    a, b = (case.program.plan(noise_pred=True, adapter=name) for name in "ab")
    text = a.encode_text(case.states)
    a.run(case.latents, 0, text)
    with pytest.raises(ValueError, match="text: encoded under another adapter"):
        b.run(case.latents, 0, text)
    free = case.program.plan(noise_pred=True)
    case.pipe.set_adapters("a", 1.0)
    text = free.encode_text(case.states)
    case.pipe.set_adapters("a", 0.5)
    with pytest.raises(ValueError, match="text: encoded under another adapter"):
        free.run(case.latents, 0, text)


def test_unknown_and_fused_adapters_are_refused(tmp_path):
    case = Adapted("sd15", tmp_path)
    with pytest.raises(ValueError, match="adapter: the network has no adapter 'c'; it has a, b"):
        case.program.plan(noise_pred=True, adapter="c")
    plan = case.program.plan(noise_pred=True, adapter="a")
    case.pipe.fuse_lora(adapter_names=["b"])
    with pytest.raises(ValueError, match="adapter: b is fused into the weights"):
        case.ours(plan)


def test_gradients_reach_the_adapter_as_in_diffusers(tmp_path):
    case = Adapted("sd15", tmp_path)
    case.unet.double().requires_grad_(False)
    case.latents, case.states = case.latents.double(), case.states.double()
    case.pipe.set_adapters("a")
    leaves = {n: p for n, p in case.unet.named_parameters() if ".a." in n}
    for p in leaves.values():
        p.requires_grad_(True)
    plan = case.program.plan(noise_pred=True, adapter="a")
    want = torch.autograd.grad(case.unet(case.latents, 300, case.states).sample.square().sum(), leaves.values())
    text = plan.encode_text(case.states)
    got = torch.autograd.grad(plan.run(case.latents, 300, text).noise_pred.square().sum(), leaves.values())
    scale = max(float(g.abs().max()) for g in want)
    assert len(leaves) == 256
    assert all(float((x - y).abs().max()) <= 1e-12 * scale for x, y in zip(got, want, strict=True))


def test_a_text_of_an_adapter_that_has_changed_since_is_refused(tmp_path):
    case = Adapted("sd15", tmp_path)
    plan = case.program.plan(noise_pred=True, adapter="a")
    text = plan.encode_text(case.states)
    with torch.no_grad():
        case.program.attention(plan.key_layers[0]).to_k.lora_B["a"].weight.add_(0.1)
    with pytest.raises(ValueError, match="text: encoded under another adapter"):
        plan.run(case.latents, 0, text)
    text = plan.encode_text(case.states)
    plan.run(case.latents, 0, text)
    # Rows of a stream are run under what is there at their turn.
    budget = text.nbytes + HEADROOM["cpu"] * plan.run_bytes(1, 16, 16, 5)
    batches = plan.stream(case.latents, 0, text, memory_budget=budget)
    next(batches)
    with torch.no_grad():
        case.program.attention(plan.key_layers[0]).to_k.lora_B["a"].weight.add_(0.1)
    with pytest.raises(ValueError, match="text: encoded under another adapter"):
        next(batches)
    case.pipe.delete_adapters("a")
    load_tiny_lora(case.pipe, "sd15", tmp_path / "c", seed=3, adapter_name="a")
    with pytest.raises(ValueError, match="text: encoded under another adapter"):
        plan.run(case.latents, 0, text)


def test_a_text_of_fused_weights_is_refused_once_they_are_not(tmp_path):
    case = Adapted("sd15", tmp_path)
    plan = case.program.plan(noise_pred=True)
    case.pipe.set_adapters("b")
    # While "a" is fused it is what counts, though "b" stays the active one.
    case.pipe.fuse_lora(adapter_names=["a"])
    text = plan.encode_text(case.states)
    plan.run(case.latents, 0, text)
    case.pipe.unfuse_lora()
    with pytest.raises(ValueError, match="text: encoded under another adapter"):
        plan.run(case.latents, 0, text)


def test_the_strength_of_an_adapter_belongs_to_the_plan(tmp_path):
    case = Adapted("sd15", tmp_path)
    case.pipe.set_adapters("a", 0.7)
    plan = case.program.plan(noise_pred=True, adapter="a")
    want = case.diffusers()
    case.pipe.set_adapters("a", 0.1)
    weaker = case.diffusers()
    close(case.ours(plan), want)
    close(case.diffusers(), weaker)


def test_copies_and_pickles_keep_the_strength_that_a_plan_has(tmp_path):
    case = Adapted("sd15", tmp_path)
    case.pipe.set_adapters("a", 0.3)
    plan = case.program.plan(noise_pred=True, adapter="a")
    case.pipe.set_adapters("a", 1.0)
    want = case.ours(plan)
    # As torch sends tensors to other processes, on the same memory.
    sent = ForkingPickler.loads(ForkingPickler.dumps(plan))
    close(case.ours(sent), want)
    copied = copy.deepcopy(plan)
    with torch.no_grad():
        case.unet.conv_in.weight.zero_()
    close(case.ours(copied), want)
    assert copied.adapter == sent.adapter == ("a",)


def test_strengths_of_every_layer_where_an_adapter_acts(tmp_path):
    case = Adapted("sd15", tmp_path)
    # The LoRA's alpha is its rank, so that a layer's scaling is the strength itself.
    case.pipe.set_adapters(["a", "b"], [{"unet": {"down": 1.0, "mid": 0.5, "up": 0.0}}, 0.25])
    found = strengths_by_layer(case.unet)
    assert found.keys() == {path for path, module in case.unet.named_modules() if hasattr(module, "lora_A")}
    wanted = {"down_blocks": 1.0, "mid_block": 0.5, "up_blocks": 0.0}
    assert all(each == [("a", wanted[path.split(".")[0]]), ("b", 0.25)] for path, each in found.items())
    assert {path.split(".")[0] for path in found} == wanted.keys()
    case.pipe.disable_lora()
    assert strengths_by_layer(case.unet) == {}
    case.pipe.enable_lora()
    case.pipe.fuse_lora(adapter_names=["a"])
    # The active adapter waits until the other is no longer fused.
    assert strengths_by_layer(case.unet) == {}
    assert strengths_by_layer(tiny_pipeline("sd15").unet) == {}


def test_tensors_that_act_are_those_of_the_plain_network_and_of_active_adapters(tmp_path):
    plain = tiny_pipeline("sd15").unet
    case = Adapted("sd15", tmp_path)
    case.pipe.disable_lora()
    want = dict(all_tensors(plain))
    found = dict(acting_tensors(case.unet))
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
    case.pipe.enable_lora()
    case.pipe.set_adapters("b")
    more = dict(acting_tensors(case.unet))
    layers = strengths_by_layer(case.unet)
    assert more.keys() - want.keys() == {f"{path}.lora_{side}.b.weight" for path in layers for side in "AB"}
    case.pipe.fuse_lora(adapter_names=["a"])
    fused = dict(acting_tensors(case.unet))
    assert fused.keys() == want.keys()
    assert all(not torch.equal(fused[f"{path}.weight"], want[f"{path}.weight"]) for path in layers)


SIZE = {"latents": 1, "texts": 1, "rows": 1, "height": 16, "width": 16, "tokens": 5}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.newest
def test_an_adapter_of_any_kind_is_switched_and_noticed(kind):
    unet = tiny_unet("sd15").eval()
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=g)
    states = torch.randn(2, 5, CROSS_ATTENTION_DIM["sd15"], generator=g)
    plain = {name: tensor.clone() for name, tensor in all_tensors(unet)}
    with torch.no_grad():
        bare = unet(latents, 300, states).sample
        new = put_adapter(unet, kind)
        adapted = unet(latents, 300, states).sample
        program = UNetProgram(unet)
        free, x, off = (program.plan(noise_pred=True, adapter=names) for names in (None, "x", ()))
        for plan, want in ((free, adapted), (x, adapted), (off, bare), (free, adapted)):
            got = plan.run(latents, 300, plan.encode_text(states)).noise_pred
            assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max())
    assert float((adapted - bare).abs().max()) > 1e-2
    # What it costs is known, or refused by the kind; products of single values are not counted.
    count = off.flops(**SIZE)
    if kind in ("ia3", "modules_to_save"):
        assert x.flops(**SIZE) - count == (0 if kind == "ia3" else 2 * 4 * 2 * (32 + 32))
    else:
        with pytest.raises(ValueError, match=f"(?i)adapter: what 'x' costs is not known, .*{kind}"):
            x.flops(**SIZE)
    # By name and value, what counts without the adapter is the plain network.
    with off.active():
        acting = dict(acting_tensors(unet))
        assert strengths_by_layer(unet) == {}
    assert acting.keys() == plain.keys()
    assert all(torch.equal(acting[name], tensor) for name, tensor in plain.items())
    acting = dict(acting_tensors(unet))
    assert new.keys() <= acting.keys()
    strengths = strengths_by_layer(unet)
    assert {name for layer in strengths.values() for name, _ in layer} == {"x"}
    # Keys are of the adapter as it was.
    key = next(name for name in new if f"{paths(unet)[program.attention(x.key_layers[0])]}.to_k." in name)
    text = x.encode_text(states)
    x.run(latents, 300, text)
    with pytest.raises(ValueError, match="text: encoded under another adapter"):
        off.run(latents, 300, text)
    before = program.weights.written()
    with torch.no_grad():
        new[key].add_(0.01)
    assert program.weights.written() != before
    with pytest.raises(ValueError, match="text: encoded under another adapter"):
        x.run(latents, 300, text)


def paths(network):
    return {module: path for path, module in network.named_modules()}


def test_adapters_of_two_kinds_around_one_layer():
    unet = tiny_unet("sd15").eval()
    latents, states = torch.randn(1, 4, 16, 16), torch.randn(1, 5, CROSS_ATTENTION_DIM["sd15"])
    inner = put_adapter(unet, "oft", "a")
    with torch.no_grad():
        want = unet(latents, 300, states).sample
        outer = put_adapter(unet, "loha", "x")
        program = UNetProgram(unet)
        both, a = (program.plan(noise_pred=True, adapter=names) for names in (("a", "x"), "a"))
        assert len(list(stack(program.attention(both.key_layers[0]).to_k))) == 2
        close(a.run(latents, 300, a.encode_text(states)).noise_pred, want)
        with both.active():
            close(both.run(latents, 300, both.encode_text(states)).noise_pred, unet(latents, 300, states).sample)
            strengths = strengths_by_layer(unet)
            layers = {path.replace(".base_layer", "") for path, _ in tuner_layers(unet)}
    assert strengths.keys() == layers
    assert {tuple(name for name, _ in layer) for layer in strengths.values()} == {("x", "a"), ("x",)}
    # Either's weights count in what was encoded.
    for new in (inner, outer):
        text = both.encode_text(states)
        with torch.no_grad():
            next(tensor for name, tensor in new.items() if "attn2.to_k" in name).add_(1)
        with pytest.raises(ValueError, match="text: encoded under another adapter"):
            both.run(latents, 0, text)


def test_what_cannot_be_switched_is_refused_by_name():
    def adapted(config):
        unet = tiny_unet("sd15").eval()
        peft.inject_adapter_in_model(config, unet, "x")
        return unet

    whole = adapted(peft.LoraConfig(target_modules=["to_q"], modules_to_save=["attn2"]))
    with pytest.raises(UnsupportedNetworkError, match=r"attn2: an adapter replaces the whole Attention"):
        UNetProgram(whole)
    taken_out = adapted(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa"))
    plan = UNetProgram(taken_out).plan(noise_pred=True, adapter=())
    with pytest.raises(ValueError, match="adapter: 'x' was made with init_lora_weights='pissa'"):
        plan.flops(**SIZE)
    unet = adapted(ADAPTERS["modules_to_save"]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(ADAPTERS["modules_to_save"](), unet, "y")
    program = UNetProgram(unet)
    with pytest.raises(ValueError, match="adapter: 'x' and 'y' each replace a whole module"):
        program.plan(noise_pred=True, adapter=("x", "y")).flops(**SIZE)


def test_what_another_thread_compiles_changes_no_call(monkeypatch):
    unet = tiny_unet("sd15").eval()
    put_adapter(unet, "loha")
    latents, states = torch.randn(2, 4, 16, 16), torch.randn(2, 5, CROSS_ATTENTION_DIM["sd15"])
    a, b = (UNetProgram(unet).plan(features=["down-level0-repeat0-vit-out"], adapter=names) for names in ("x", ()))
    text = a.encode_text(states)
    # Of the process: torch puts it up for as long as any thread compiles.
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    with pytest.raises(ValueError, match="text: encoded under another adapter"):
        b.run(latents, 0, text)
    with pytest.raises(ValueError, match="text_index: values from 0 to 2"):
        a.run(latents, 0, text, text_index=[0, 2])
    a.run(latents, 0, text, checkpoint=True)
    with a.active():
        alone = threading.Thread(target=b.encode_text, args=(states,), daemon=True)
        alone.start()
        alone.join(0.1)
        assert alone.is_alive()
    alone.join(60)
    assert not alone.is_alive()
