"""Which layers and timesteps an official call asks for."""

import diffusers
import numpy as np
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.compat import DSDPipeline
from dsd_fast.compat.selection import select_layers, timestep_grid
from dsd_fast.unet import UNetProgram
from tests.compat.pairs import PROMPTS, TIMES, arrays, images
from tests.tiny import tiny_pipeline, tiny_unet

SD15, SDXL = (UNetProgram(tiny_unet(family)).score_ids for family in ("sd15", "sdxl"))
NOTHING = dict.fromkeys(("ublock", "level", "block", "attn", "tfblock", "layer_mask"))


def selected(ids=SD15, **arguments):
    return select_layers(lambda: ids, **(NOTHING | arguments))


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        ({"ublock": "down"}, [f"down-level2-repeat{n}-vit-block0-cross" for n in range(2)]),
        ({"ublock": "mid"}, ["mid-vit-block0-cross"]),
        ({"ublock": "up"}, [f"up-level3-repeat{n}-vit-block0-cross" for n in range(3)]),
        ({"ublock": "up", "block": "block_1"}, [f"up-level1-repeat{n}-vit-block0-cross" for n in range(3)]),
        ({"ublock": "up", "level": 2, "block": "2", "attn": "attn_1"}, ["up-level2-repeat1-vit-block0-cross"]),
        (
            {"ublock": "down", "level": "level1", "attn": 0, "tfblock": "tfblock_0"},
            ["down-level1-repeat0-vit-block0-cross"],
        ),
        ({"ublock": "mid", "block": "block", "attn": "attn_0"}, ["mid-vit-block0-cross"]),
        ({"layer_mask": [SD15[3], SD15[0]]}, [SD15[3], SD15[0]]),
        ({"layer_mask": torch.arange(16) % 8 == 1}, [SD15[1], SD15[9]]),
        ({"layer_mask": [n == 4 for n in range(16)]}, [SD15[4]]),
    ],
)
def test_selection(arguments, ids):
    assert selected(**arguments) == ids


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        ({"ublock": "down"}, [f"down-level2-repeat{n}-vit-block2-cross" for n in range(2)]),
        ({"ublock": "up", "block": 0, "attn": 2}, ["up-level0-repeat2-vit-block2-cross"]),
        ({"ublock": "up", "tfblock": 0}, [f"up-level1-repeat{n}-vit-block0-cross" for n in range(3)]),
        ({"ublock": "mid", "tfblock": 1}, ["mid-vit-block1-cross"]),
    ],
)
def test_selection_among_several_transformer_blocks(arguments, ids):
    assert selected(SDXL, **arguments) == ids


def test_without_a_selection_the_layers_are_the_official_ones():
    """The official call never forwards `ublock`, without which its UNet reads no other argument."""
    assert selected() == "official"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 1}, "level: got 1 without ublock"),
        ({"tfblock": "tfblock_0"}, "tfblock: got 'tfblock_0' without ublock"),
        ({"ublock": "left"}, "ublock: got 'left', expected 'down', 'mid' or 'up'"),
        (
            {"ublock": "up", "block": "block_0"},
            "block: got 'block_0', but cross-attention in the up part is at 1, 2, 3",
        ),
        ({"ublock": "up", "level": 1, "block": 2}, "level, block: got 1 and 2, which name two blocks"),
        ({"ublock": "up", "attn": 3}, "attn: got 3, but cross-attention in the up part is at 0, 1, 2"),
        ({"ublock": "up", "tfblock": 1}, "tfblock: got 1, but cross-attention in the up part is at 0"),
        ({"ublock": "up", "attn": "block_1"}, "attn: got 'block_1', expected a number, or one as in 'attn_0'"),
        ({"layer_mask": [SD15[0]], "ublock": "up"}, "layer_mask: give either this or ublock"),
        ({"layer_mask": ["up"]}, "layer_mask: got 'up', expected ids out of down-level0"),
        ({"layer_mask": [True] * 15}, "layer_mask: got 15 values, expected score ids, or a bool for each of 16"),
        ({"layer_mask": [False] * 16}, "layer_mask: selects no layer"),
        ({"layer_mask": "up"}, "layer_mask: got 'up', expected score ids"),
    ],
)
def test_bad_selections_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        selected(**arguments)


def test_a_part_without_cross_attention():
    with pytest.raises(ValueError, match="ublock: got 'down', a part in which this UNet has no cross-attention"):
        selected([name for name in SD15 if not name.startswith("down")], ublock="down")


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({"ublock": "up", "level": 2, "attn": 1}, ["up-level2-repeat1-vit-block0-cross"]),
        ({"layer_mask": [SD15[3], SD15[7]]}, [SD15[3], SD15[7]]),
    ],
)
def test_the_selected_layers_make_the_score(arguments, layers):
    stock = tiny_pipeline("sd15")
    model, pixels = dsd.from_pipeline(stock), images(3)
    options = {"image": pixels, "sampled_timestep": TIMES, "unconditional": False, "guidance_scale": 0}
    got = DSDPipeline(model)(prompt=PROMPTS, use_bias=False, **options, **arguments)
    config = dsd.MatchConfig(timesteps=TIMES, layers=layers, attention_weight=1.0, noise_weight=0.0)
    want = dsd.Matcher(model, config).score(arrays(pixels), PROMPTS).diagonal()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("steps", "strength", "inference"), [(50, 0.8, 50), (30, 0.5, 40), (7, 1.0, 50), (100, 0.0, 9)]
)
def test_timestep_grid_is_the_official_code(steps, strength, inference):
    timesteps = diffusers.DDIMScheduler().timesteps
    start = max(inference - min(int(inference * strength), inference), 0)
    indices = np.arange(start, len(timesteps) - start, int(1000 / steps))
    assert timestep_grid(1000, steps, strength, inference, None) == timesteps[indices].tolist()[::-1]


def test_given_timesteps_take_the_grids_place():
    assert timestep_grid(1000, 50, 0.8, 50, 7) == [7]
    assert timestep_grid(1000, 50, 0.8, 50, torch.tensor(7)) == [7]
    assert timestep_grid(1000, 50, 0.8, 50, [900, 7]) == [900, 7]
    with pytest.raises(ValueError, match="sampled_timestep: timesteps is empty"):
        timestep_grid(1000, 50, 0.8, 50, [])
