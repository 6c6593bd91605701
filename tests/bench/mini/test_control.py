"""The mini model's ControlNet and LoRA: their training, and what the shipped ones do on scenes held out from it."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import dsd_fast as dsd
from benchmarks.mini.control import build_control, export_control, train_control
from benchmarks.mini.loop import Recipe, average
from benchmarks.mini.lora import night
from benchmarks.mini.networks import preprocess
from benchmarks.mini.train import app
from dsd_fast.jobs import read_tensors
from dsd_fast.models import mini
from dsd_fast.models.controlnet import Control, check_controls, control_residuals, load_controlnet
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from dsd_fast.training import CHECKPOINT

pytest.importorskip("cv2")
pytest.importorskip("sklearn")

SCENES = 48
TIMESTEPS = (100, 800)


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(scope="module")
def scenes():
    return [scene(EVAL_SEED + 5000 + number) for number in range(SCENES)]


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def noise_losses(model, images, captions, t, conditions=None, adapter=None):
    """(N,) mean squared error of the noise prediction at one timestep, with noise that depends on t alone."""
    with torch.no_grad():
        clean = model.encode_images(preprocess(torch.from_numpy(np.stack(images))))
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(t))
        signal = model.schedule.alphas_cumprod[t]
        latents = (signal**0.5 * clean + (1 - signal) ** 0.5 * noise).float()
        states = model.encode_prompts(captions).states
        residuals = None
        if conditions is not None:
            residuals = control_residuals([Control(load_controlnet("mini"))], [conditions], latents, t, states)
        plan = dsd.unet.UNetProgram(model.unet).plan(noise_pred=True, adapter=adapter)
        predicted = plan.run(latents, t, plan.encode_text(states), residuals=residuals).noise_pred
        return (predicted - noise).square().mean((1, 2, 3))


def less(smaller, larger):
    """Whether a paired difference of means is beyond three standard errors."""
    difference = larger - smaller
    return float(difference.mean()) > 3 * float(difference.std()) / len(difference) ** 0.5


@pytest.mark.parametrize("t", TIMESTEPS)
def test_shipped_controlnet_follows_the_edges_of_new_scenes(model, scenes, t):
    images, captions = [each.image for each in scenes], [""] * SCENES
    control = Control(load_controlnet("mini"))
    check_controls([control], model)
    edges = torch.stack([control.prepare(Image.fromarray(image), (64, 64)) for image in images])
    right = noise_losses(model, images, captions, t, edges)
    without = noise_losses(model, images, captions, t)
    wrong = noise_losses(model, images, captions, t, edges.roll(1, 0))
    assert less(right, without)
    assert less(without, wrong)


@pytest.mark.parametrize("t", TIMESTEPS)
def test_shipped_lora_knows_the_pictures_it_was_made_for(scenes, t):
    images, captions = [night(each.image, each.seed) for each in scenes], [each.caption for each in scenes]
    model = dsd.load("mini")
    model.load_lora("mini", "dark")
    adapted, plain = (noise_losses(model, images, captions, t, adapter=name) for name in ("dark", ()))
    assert float(adapted.mean()) < 0.8 * float(plain.mean())
    assert less(adapted, plain)
    # On the model's own scenes it can only lose.
    assert less(*(noise_losses(model, [each.image for each in scenes], captions, t, adapter=a) for a in ((), "dark")))


def test_night_is_the_scenes_own_and_moves_nothing(scenes):
    for each in scenes[:4]:
        dark = night(each.image, each.seed)
        assert dark.dtype == np.uint8
        assert np.array_equal(dark, night(each.image, each.seed))
        assert not np.array_equal(dark, night(each.image, each.seed + 1))
    # Exposures between 0.2 and 0.35 of 0.6, 0.8 and 1.1 of the light, 10 more, and noise whose mean over 4096 pixels
    # deviates by 8 / 64.
    means = np.stack([night(np.full((64, 64, 3), 200, np.uint8), seed).mean((0, 1)) for seed in range(20)])
    exposures = (means - 10) / (200 * np.array([0.6, 0.8, 1.1]))
    assert exposures.min() > 0.19
    assert exposures.max() < 0.36
    assert np.ptp(exposures, 1).max() < 0.01
    assert np.ptp(exposures.mean(1)) > 0.08


def test_an_untrained_controlnet_is_the_encoder_and_changes_nothing(model):
    net = build_control(model)
    latents, states = torch.randn(2, 4, 16, 16), torch.randn(2, 24, 128)
    down, mid = control_residuals([Control(net, None)], [torch.rand(2, 3, 64, 64)], latents, 10, states)
    assert not any(tensor.any() for tensor in (*down, mid))
    unet = model.unet.state_dict()
    copied = [key for key, value in net.state_dict().items() if key in unet and torch.equal(value, unet[key])]
    assert len(copied) == len([key for key in net.state_dict() if not key.startswith("controlnet_")])
    assert {"conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.2.resnets.0.conv2.weight"} <= set(copied)
    assert "mid_block.resnets.0.conv1.weight" in copied


def test_stopped_control_training_goes_on_as_if_it_had_not_been(tmp_path):
    def run(folder, **options):
        model = dsd.load("mini")
        net = build_control(model)
        return net, train_control(model, net, Recipe(3, 4, 1e-3), folder, pictures=8, **options)

    assert run(tmp_path / "whole")[1]
    assert not run(tmp_path / "stopped", minutes=0)[1]
    assert read_tensors(tmp_path / "stopped" / "control" / CHECKPOINT)[1]["step"] == 1
    net, done = run(tmp_path / "stopped")
    assert done
    whole, stopped = (average(tmp_path / name, "control") for name in ("whole", "stopped"))
    assert all(torch.allclose(value, stopped[key], rtol=1e-4, atol=1e-6) for key, value in whole.items())
    size = export_control(net, tmp_path / "whole", tmp_path / "net")
    assert size == sum(file.stat().st_size for file in (mini.path() / "controlnet").iterdir())
    loaded = load_controlnet(tmp_path / "net").state_dict()
    assert all(torch.equal(loaded[key], value.half().float()) for key, value in whole.items())


@pytest.mark.usefixtures("_threads")
def test_commands_train_and_export(tmp_path):
    few = ["--threads", "1", "--steps", "2", "--batch", "2", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, ["control", *few, "--pictures", "4", "--minutes", "0"]).exit_code == 3
    result = CliRunner().invoke(app, ["control", *few, "--pictures", "4"])
    assert result.exit_code == 0, result.output
    check_controls([Control(load_controlnet(tmp_path / "controlnet"))], dsd.load("mini"))

    assert CliRunner().invoke(app, ["lora", *few, "--pictures", "2", "--minutes", "0"]).exit_code == 3
    result = CliRunner().invoke(app, ["lora", *few, "--pictures", "2"])
    assert result.exit_code == 0, result.output
    model = dsd.load("mini")
    model.load_lora(tmp_path / "lora", "trained")
    own, shipped = (load_file(folder / "lora" / NAME) for folder in (tmp_path, mini.path()))
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in shipped.items()}
    # After two steps of an average that follows quickly, both factors have moved.
    assert all(value.any() for value in own.values())


NAME = "pytorch_lora_weights.safetensors"
