"""Numbers made with the official code on a small SD-1.5-shaped network (tests/data/sd15like)."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from dsd_fast.matching import official_layers
from dsd_fast.unet import UNetProgram

DATA = Path(__file__).parents[1] / "data" / "sd15like"


@pytest.fixture(scope="module")
def program():
    return UNetProgram(UNet2DConditionModel.from_pretrained(DATA, use_safetensors=True))


@pytest.fixture(scope="module")
def oracle():
    return load_file(DATA / "dsd_scores.safetensors")


def test_the_official_layers_are_the_six_of_the_official_code(program):
    assert official_layers(program) == [
        "down-level2-repeat0-vit-block0-cross",
        "down-level2-repeat1-vit-block0-cross",
        "mid-vit-block0-cross",
        "up-level3-repeat0-vit-block0-cross",
        "up-level3-repeat1-vit-block0-cross",
        "up-level3-repeat2-vit-block0-cross",
    ]


@pytest.mark.parametrize("t", [1, 261, 801])
@pytest.mark.parametrize("part", ["all", "down", "mid", "up"])
def test_scores(program, oracle, t, part):
    """Each pair alone: the unconditional and the conditional row, attention averaged over both."""
    layers = [name for name in official_layers(program) if part == "all" or name.startswith(part)]
    plan = program.plan(scores=layers, noise_pred=True)
    text = plan.encode_text(torch.cat([oracle["cond"], oracle["uncond"]]))
    with torch.no_grad():
        out = plan.run(
            oracle["latents"], t, text, latent_index=[0, 1, 2, 3, 0, 1, 2, 3], text_index=[0, 1, 2, 3, 4, 4, 4, 4]
        )
    attention = torch.stack([out.scores[name].mean(1) for name in layers]).mean(0).view(2, 4).mean(0)
    errors = (out.noise_pred - oracle["noise"].repeat(2, 1, 1, 1)).flatten(1).norm(dim=1).view(2, 4)
    torch.testing.assert_close(attention, oracle[f"t{t}.{part}.bias0"], rtol=0, atol=1e-4)
    torch.testing.assert_close(attention + errors[1] - errors[0], oracle[f"t{t}.{part}.bias1"], rtol=0, atol=1e-4)


def test_activations(program, oracle):
    """Stored in half precision: equal to 1e-3 of their scale."""
    stored = load_file(DATA / "features.safetensors")
    ids = [name.removeprefix("t50.") for name in stored if name != "t50.eps"]
    plan = program.plan(features=ids, noise_pred=True)
    with torch.no_grad():
        out = plan.run(oracle["latents"][:2], 50, plan.encode_text(oracle["cond"][:2]))
    for name in ids:
        want = stored[f"t50.{name}"].float()
        assert out.features[name].shape == want.shape
        assert float((out.features[name] - want).abs().max()) <= 1e-3 * float(want.abs().max()), name
    torch.testing.assert_close(out.noise_pred, stored["t50.eps"], rtol=1e-4, atol=1e-5)
