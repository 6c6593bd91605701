"""A cut through a network: frozen, itself and no other, and enough to be run and counted."""

import dataclasses

import pytest
import torch

from dsd_fast.unet import UNetProgram
from dsd_fast.unet.cut import Cut
from dsd_fast.unet.execution import run_eager
from dsd_fast.unet.network import Network
from dsd_fast.unet.request import Request
from dsd_fast.unet.stream import rows_at_once
from tests.tiny import CROSS_ATTENTION_DIM, tiny_unet
from tests.unet.compiled import Case, small_unet

FIRST, LAST = "down-level0-repeat0-vit-block0-cross", "up-level1-repeat1-vit-block0-cross"


def test_equal_cuts_are_not_the_same():
    network = Network(small_unet("sd15"))
    one, other = Cut(network, scores=(FIRST,)), Cut(network, scores=(FIRST,))
    assert one.steps == other.steps
    assert one.regions == other.regions
    assert one != other
    assert len({one: "recordings", other: "recordings"}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.steps = ()


def test_what_follows_from_what_is_asked():
    network = Network(small_unet("sd15"))
    short = Cut(network, scores=(FIRST,))
    assert [step.name for step in short.steps][-1] == FIRST
    assert (short.key_layers, short.value_layers) == ((FIRST,), ())
    assert (short.kept_skips, short.reads_time, short.reads_text, short.maps_text) == (frozenset(), True, True, False)
    assert short.boundary == len(short.steps) - 1
    whole = Cut(network, maps=(LAST,), noise_pred=True)
    assert whole.steps[-1].name == network.output_id == "unet-out"
    assert len(whole.key_layers) == len(whole.value_layers) == len(network.score_ids) == 4
    assert whole.kept_skips == frozenset(range(4))
    assert whole.maps_text
    start = Cut(network, features=("unet-in",))
    assert (start.boundary, start.reads_time, start.reads_text, start.key_layers) == (1, False, False, ())
    # A ControlNet's addition has nothing to compile and nothing to drop.
    (bare,) = [region for region in whole.regions if not region.checkpointed]
    assert not bare.compiled
    assert [step.name for step, _ in bare.steps] == ["mid-residual"]


def test_a_cut_is_run_and_counted_without_a_plan():
    case = Case("sd15")
    request = case.request()
    plan = case.program.plan(noise_pred=True, scores=[FIRST])
    cut = Cut(case.program, scores=(FIRST,), noise_pred=True)
    with torch.no_grad():
        text = plan.encode_text(request["states"])
        rows = (request["latent_index"], request["text_index"], None, None, None, None)
        got = run_eager(cut, Request(cut, request["latents"], request["timesteps"], text, *rows))
        want = plan.run(request["latents"], request["timesteps"], text, latent_index=rows[0], text_index=rows[1])
    assert torch.equal(got.noise_pred, want.noise_pred)
    assert torch.equal(got.scores[FIRST], want.scores[FIRST])
    budget = 1 << 24
    assert rows_at_once(cut, 16, 16, 11, memory_budget=budget) == rows_at_once(plan, 16, 16, 11, memory_budget=budget)


def test_what_a_network_tells_is_what_its_config_says():
    for family in ("sd15", "sdxl"):
        unet = tiny_unet(family)
        network = Network(unet)
        assert network.unet is network.module is unet
        assert network.latent_channels == unet.config.in_channels == 4
        assert network.time_width == unet.time_embedding.linear_2.out_features
        assert network.text_width == CROSS_ATTENTION_DIM[family]
        assert network.reads_pooled_text == (family == "sdxl")
    assert network.pooled_width == 20
    assert Network(small_unet("sd15")).pooled_width == 0
    assert Network(small_unet("sd15")).residual_shapes(16, 16) == [
        (16, 16, 16),
        (16, 16, 16),
        (16, 8, 8),
        (32, 8, 8),
        (32, 8, 8),
    ]


def test_an_empty_output_has_memory_of_its_own_for_each_result():
    program = UNetProgram(small_unet("sd15"))
    out = program.plan(features=["unet-out"], noise_pred=True).empty_output(2, 16, 16)
    assert out.noise_pred.shape == out.features["unet-out"].shape
    assert out.noise_pred.data_ptr() != out.features["unet-out"].data_ptr()
