"""The suite `unet`: the architectures are the real ones, and every side gives diffusers' prediction."""

import types

import pytest
import torch
from diffusers import UNet2DConditionModel

from dsd_fast.bench import Context, Target
from dsd_fast.bench.run import checked
from dsd_fast.bench.suites import unet
from dsd_fast.bench.suites.unet_networks import ARCHITECTURES, Architecture, Network, random_weights
from dsd_fast.unet import UNetProgram
from tests.tiny import CROSS_ATTENTION_DIM, tiny_unet

# Millions of parameters, and TFLOP of a forward pass with 77 tokens, as published for these models.
PUBLISHED = {"sd15": (860, 0.803), "sd21-base": (866, 0.804), "sdxl": (2567, 6.761)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_architectures_are_the_published_ones(name):
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        network = UNet2DConditionModel(**architecture.config)
    parameters, tflop = PUBLISHED[name]
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == parameters
    side = architecture.side
    plan = UNetProgram(network).plan(noise_pred=True)
    flops = plan.flops(latents=1, texts=1, rows=1, height=side, width=side, tokens=77)
    assert round(flops / 1e12, 3) == tflop
    # What is measured has the keys and values already.
    assert 0.985 * flops < unet._flops(plan, 1, side) < flops


def small(family):
    """A tiny network's architecture."""
    config = {key: value for key, value in tiny_unet(family).config.items() if not key.startswith("_")}
    pooled = config["projection_class_embeddings_input_dim"]
    extra = 6 * config["addition_time_embed_dim"] if pooled else 0
    return Architecture(config, 16, (pooled or 0) - extra)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_side_gives_diffusers_prediction(family, monkeypatch):
    monkeypatch.setitem(unet.ARCHITECTURES, "small", small(family))
    monkeypatch.setattr(unet, "RUNTIMES", ())
    work = unet._eager("small", 3, Context())
    assert [side.name for side in work.sides] == ["diffusers", "plan"]
    flops, differences = checked(work)
    assert all(0 < difference <= 1 for difference in differences)
    # Diffusers projects the texts' keys and values too.
    assert flops[1] < flops[0]
    assert (work.dtype, work.items, work.launches) == ("bfloat16", 3, True)
    assert work.oracle()[0].shape == (2, 4, 16, 16)
    wrong = work.sides[1].run()
    assert work.difference(wrong * 1.1, work.oracle()) > 1


@pytest.fixture
def uncompiled():
    """What torch.compile gives runs as it was written: compiling a network takes minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_compiled_sides(monkeypatch, uncompiled):
    monkeypatch.setitem(unet.ARCHITECTURES, "small", small("sd15"))
    monkeypatch.setattr(unet, "RUNTIMES", ("inductor",))
    work = unet._compiled("small", 2, "default", Context())
    assert [side.name for side in work.sides] == [
        "diffusers, channels-last, torch.compile (default)",
        "plan, inductor",
    ]
    flops, _ = checked(work)
    assert flops[1] < flops[0]
    assert work.comparisons()[0][2] == [Target("ratio", 1.25)]


def test_a_network_is_random_and_of_a_trained_ones_scale():
    network = Network(small("sdxl"), "cpu", torch.bfloat16)
    assert network.truth.shape == (2, 4, 16, 16)
    assert network.truth.dtype == torch.float32
    assert 0.3 < float(network.truth.std()) < 3
    assert all(float(p.float().std()) > 0 for p in network.unet.parameters() if p.numel() > 1)
    latents, states, pooled, ids = network.inputs(3)
    assert latents.dtype == states.dtype == pooled.dtype == torch.bfloat16
    assert states.shape == (3, 77, CROSS_ATTENTION_DIM["sdxl"])
    assert not torch.equal(latents[0], latents[1])
    assert torch.equal(network.inputs(1)[0], latents[:1])
    assert ids.tolist() == [128, 128, 0, 0, 128, 128]
    wide = network.inputs(3, torch.float32)[0]
    assert torch.equal(wide, latents.float())


def test_no_weight_is_left_as_it_was_made():
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7.0)
    random_weights(module)
    assert all(not (parameter == 7.0).any() for parameter in module.parameters())
    assert float(module[0].weight.detach().std()) == pytest.approx((4 * 9) ** -0.5, rel=0.2)


def test_the_mini_models_sides_agree(uncompiled):
    work = unet._mini(2, Context())
    assert [side.name for side in work.sides] == ["diffusers", "diffusers, channels-last", "plan", "plan, inductor"]
    checked(work)
    pairs = [(work.sides[subject].name, work.sides[baseline].name) for subject, baseline, _ in work.comparisons()]
    assert pairs == [
        ("plan", "diffusers"),
        ("plan", "diffusers, channels-last"),
        ("plan, inductor", "diffusers"),
        ("plan, inductor", "plan"),
    ]


@pytest.mark.parametrize(
    ("device", "name", "rows", "rate"),
    [
        ("NVIDIA H200", "sd15", 16, 450.0),
        ("NVIDIA H200", "sd21-base", 64, 520.0),
        ("NVIDIA H200", "sd15", 4, None),
        ("NVIDIA H200", "sdxl", 16, None),
        ("NVIDIA A100", "sd15", 16, None),
    ],
)
def test_rates_are_of_one_device(monkeypatch, device, name, rows, rate):
    monkeypatch.setattr(torch, "cuda", types.SimpleNamespace(get_device_name=lambda _: device))
    assert unet._rate(name, rows, "cuda") == rate
    assert unet._rate(name, rows, "cpu") is None


def test_the_suite_has_what_it_promises():
    cases = {case.name: case for case in unet.suite.cases}
    assert [name for name in cases if name.startswith("mini/")] == [f"mini/{rows}" for rows in (1, 4, 16, 64)]
    modes = {1: "reduce-overhead", 2: "reduce-overhead", 4: "reduce-overhead"}
    for name in ("sd15", "sd21-base", "sdxl"):
        for rows in (1, 2, 4, 16, 32, 64):
            assert f"{name}/{rows}" in cases
            assert f"{name}/{rows}/against-{modes.get(rows, 'max-autotune-no-cudagraphs')}" in cases
    short = [case.name for case in unet.suite.cases if not case.long and case.devices == ("cuda",)]
    assert set(short) == {
        "sd15/1",
        "sd15/16",
        "sd21-base/16",
        "sd15/16/against-default",
        "sd15/1/against-reduce-overhead",
    }
    assert all(case.repeats >= 6 for case in cases.values())
    assert all(case.devices == (("cpu",) if case.group == "mini" else ("cuda",)) for case in cases.values())
