"""The extractor against numbers of the official code, and against stock diffusers run once per image and timestep."""

import copy
import inspect
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

import dsd_fast as dsd
from dsd_fast.diffusion import NoiseSchedule, noise
from dsd_fast.features import FeatureExtractor, Technique
from dsd_fast.images.canny import canny
from dsd_fast.models import Model
from dsd_fast.models.controlnet import Control
from dsd_fast.models.mini.scenes import scene
from dsd_fast.models.prompts import PromptStates
from dsd_fast.reference import features as reference
from dsd_fast.reference import inputs
from tests.reference.test_matching import pictures
from tests.tiny import tiny_pipeline, tiny_unet, trained_like

DATA = Path(__file__).parents[1] / "data/sd15like"
FAMILIES = {"sd15": "epsilon", "sd21": "v_prediction", "sdxl": "epsilon"}
PROMPTS = ["a red dog", "two cats on a blue mat", ""]
LAYERS = [
    "up-level1-repeat1-vit-block0-cross-q",
    "up-level0-repeat1-res-out",
    "mid-vit-out",
    "up-level1-repeat2-vit-out",
]


def made(family, dtype=torch.float32):
    """A pipeline whose schedule is as exact as the package's, and the model on it.

    Diffusers multiplies ᾱ up in float32, the package in float64.
    """
    pipe = tiny_pipeline(family, prediction_type=FAMILIES[family]).to(dtype)
    pipe.scheduler.alphas_cumprod = NoiseSchedule.from_scheduler(pipe.scheduler).alphas_cumprod
    return pipe, dsd.from_pipeline(pipe)


def latents_of(pipe, images, size=None):
    """Clean latents, (N, C, h, w)."""
    if size is not None:
        images = [image.resize(size[::-1], Image.Resampling.BICUBIC) for image in images]
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        pixels = 2 * (pixels / 255) - 1
    else:
        pixels = inputs.preprocess(pipe, images)
    with torch.no_grad():
        return inputs.encode_images(pipe.vae, pixels)


def close(found, want, tolerance):
    """Every value within `tolerance` of its feature's largest."""
    assert list(found) == list(want)
    for name, right in want.items():
        assert found[name].shape == right.shape, name
        assert found[name].dtype == right.dtype, name
        difference = float((found[name] - right).abs().max() / right.abs().max())
        assert difference <= tolerance, f"{name}: {difference}"


# Of each feature's largest value. Two orders of the same sums, some twenty layers deep.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.newest
def test_all_ids_equal_stock_diffusers_run_once_per_timestep(family, dtype):
    pipe, model = made(family, dtype)
    names = [name for name in reference.layer_ids(pipe.unet) if not name.endswith("-map")]
    maps = [name for name in reference.layer_ids(pipe.unet) if name.endswith("-map")]
    extractor = FeatureExtractor(model, [*names, *maps], [701, 0, 50])
    assert set(extractor.program.layer_ids) == set(extractor.layers)
    images = pictures(2)
    found = extractor.extract(images, PROMPTS[:2], seed=3)
    want = reference.extract(
        pipe,
        [],
        layers=[*names, *maps],
        timesteps=[701, 0, 50],
        prompts=PROMPTS[:2],
        seed=3,
        latents=latents_of(pipe, images),
    )
    close(found, want, TOLERANCES[dtype])
    assert extractor.shapes == {name: tuple(value.shape[2:]) for name, value in want.items()}


def test_activations_equal_the_official_codes(monkeypatch):
    """Stored in half precision, whose relative error is 2⁻¹¹; values near 0 lose 2⁻²⁵, float32 1e-5 of the largest."""
    given, stored = load_file(DATA / "dsd_scores.safetensors"), load_file(DATA / "features.safetensors")
    pipe = tiny_pipeline("sd15")
    config = json.loads((DATA / "config.json").read_text())
    pipe.unet = diffusers.UNet2DConditionModel.from_config(config).eval()
    pipe.unet.load_state_dict(load_file(DATA / "diffusion_pytorch_model.safetensors"))
    model = dsd.from_pipeline(pipe)
    # The file starts from noised latents and from text states: the images and prompts that give those.
    signal, sigma = (float(each) for each in model.schedule.coefficients([50]))
    clean = (given["latents"][:2].double() - sigma * noise(3, 0, (4, 16, 16)).double()) / signal
    monkeypatch.setattr(Model, "encode_images", lambda self, pixels, *_: clean.float()[: len(pixels)])
    rows = {"first": 0, "second": 1}

    def encode(self, prompts, clip_skip=None):
        states = given["cond"][[rows[prompt] for prompt in prompts]]
        lengths = torch.full((len(states),), 77)
        return PromptStates(states, None, lengths, torch.zeros(len(states), 77, dtype=torch.long))

    monkeypatch.setattr(Model, "encode_prompts", encode)
    names = [name.removeprefix("t50.") for name in stored if name != "t50.eps"]
    extractor = FeatureExtractor(model, [*names, "unet-out"], [50])
    found = extractor.extract(pictures(2), ["first", "second"], seed=3)
    for name in names:
        want = stored[f"t50.{name}"].float()
        torch.testing.assert_close(
            found[name][:, 0], want, rtol=2**-11, atol=2e-5 * float(want.abs().max()) + 2**-25, msg=name
        )
    torch.testing.assert_close(found["unet-out"][:, 0], stored["t50.eps"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_and_prompts_go_the_whole_way(family):
    """Through the VAE and the text encoders too, in another batch."""
    pipe, model = made(family)
    for prompts in (PROMPTS, ""):
        found = FeatureExtractor(model, LAYERS, [20, 400]).extract(pictures(3), prompts, seed=1)
        want = reference.extract(pipe, pictures(3), layers=LAYERS, timesteps=[20, 400], prompts=prompts, seed=1)
        # The VAE's and the text encoder's own rounding, of some 1e-6, comes first.
        close(found, want, 3e-5)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_draws_and_seeds(family):
    pipe, model = made(family)
    images = pictures(2)
    common = {"layers": LAYERS, "timesteps": [300, 10], "latents": latents_of(pipe, images), "draws": 3}
    for keep in (False, True):
        extractor = FeatureExtractor(model, LAYERS, [300, 10], draws=3, keep_draws=keep)
        want = reference.extract(pipe, [], **common, keep_draws=keep, seed=5)
        close(extractor.extract(images, seed=5), want, 1e-5)
        want = reference.extract(pipe, [], **common, keep_draws=keep, seeds=[4, 9])
        close(extractor.extract(images, seeds=[4, 9]), want, 1e-5)


@pytest.mark.parametrize("size", [(12, 9), (15, 7)])
def test_odd_sizes(size):
    pipe, model = made("sd15")
    images, pixels = pictures(2), (size[0] * 4, size[1] * 4)
    names = [name for name in reference.layer_ids(pipe.unet) if name.endswith(("-out", "-q", "-map"))]
    extractor = FeatureExtractor(model, names, [50], image_size=pixels)
    want = reference.extract(pipe, [], layers=names, latents=latents_of(pipe, images, pixels))
    assert extractor.latent_size == size
    close(extractor.extract(images), want, 1e-5)


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, ["up_cross"]) for family in FAMILIES), ("sd15", ["up_self", "down_cross", "down_self"])],
)
def test_attention(family, attention):
    pipe, model = made(family)
    images = pictures(2)
    common = {"layers": LAYERS[:1], "timesteps": [50, 600], "attention": attention, "prompts": PROMPTS[:2], "draws": 2}
    want = reference.extract(pipe, [], **common, latents=latents_of(pipe, images))
    extractor = FeatureExtractor(model, LAYERS[:1], [50, 600], attention=attention, draws=2)
    assert extractor.layers == (LAYERS[0], "attn")
    close(extractor.extract(images, PROMPTS[:2]), want, 1e-5)
    alone = FeatureExtractor(model, [], [50, 600], attention=attention, draws=2).extract(images, PROMPTS[:2])
    close(alone, {"attn": want["attn"]}, 1e-5)


def test_official_resizing():
    pipe, model = made("sd15")
    images = pictures(1)
    names = ["up-level2-upsampler-out", *LAYERS]
    want = reference.extract(pipe, [], layers=names, feature_resize=2, latents=latents_of(pipe, images))
    close(FeatureExtractor(model, names, resize=2).extract(images), want, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_official_timesteps(family):
    pipe, model = made(family)
    images, asked = pictures(1), [50, 60, 0, 999]
    extractor = FeatureExtractor(model, LAYERS, asked, official_timesteps=True)
    assert extractor.timesteps == [reference.effective_timestep(pipe, t) for t in asked]
    common = {"layers": LAYERS, "timesteps": asked, "official_timesteps": True}
    close(extractor.extract(images), reference.extract(pipe, [], **common, latents=latents_of(pipe, images)), 1e-5)


# Several predictions one after another, each of whose rounding the next one sees.
WALK = 2e-4


@pytest.mark.parametrize(
    ("family", "way"),
    [
        *((family, way) for family in FAMILIES for way in ({"inversion": True}, {"denoise_from": 54})),
        ("sd15", {"denoise_from": 150}),
        ("sd21", {"denoise_from": 150}),
        ("sdxl", {"denoise_from": 150}),
    ],
    ids=str,
)
def test_official_ways_to_the_latents(family, way):
    """Right for batches, where the official inversion fails."""
    pipe, model = made(family)
    images, asked = pictures(2), [50, 0]
    common = {"layers": ["unet-in", *LAYERS], "timesteps": asked, "official_timesteps": True, "prompts": PROMPTS[:2]}
    want = reference.extract(pipe, [], **common, **way, latents=latents_of(pipe, images))
    extractor = FeatureExtractor(
        model, ["unet-in", *LAYERS], asked, official_timesteps=True, technique=Technique(**way)
    )
    close(extractor.extract(images, PROMPTS[:2]), want, WALK)


def by_hand(pipe, latents, states, steps, pooled=None):
    """DDIM through levels (from, told to the network, to), float64 outside the network; −1 is the clean latent."""
    z = latents.double()

    def abar(t):
        return pipe.scheduler.alphas_cumprod[t] if t >= 0 else torch.tensor(1.0, dtype=torch.float64)

    for level, told, to in steps:
        alpha = abar(level)
        output = pipe.unet(z.float(), told, states).sample.double()
        if pipe.scheduler.config.prediction_type == "v_prediction":
            eps = alpha.sqrt() * output + (1 - alpha).sqrt() * z
            clean = alpha.sqrt() * z - (1 - alpha).sqrt() * output
        else:
            eps, clean = output, (z - (1 - alpha).sqrt() * output) / alpha.sqrt()
        z = abar(to).sqrt() * clean + (1 - abar(to)).sqrt() * eps
    return z


@pytest.mark.parametrize("family", ["sd15", "sd21"])
@torch.no_grad()
def test_exact_inversion(family):
    """Up the grid 1, 11, 21, … from the clean latent, and aside to exactly the timestep."""
    pipe, model = made(family)
    images = pictures(2)
    states = torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in PROMPTS[:2]])
    found = FeatureExtractor(model, ["unet-in"], [38, 11, 0, 5], technique=Technique(inversion=True))
    found = found.extract(images, PROMPTS[:2])["unet-in"]
    clean = latents_of(pipe, images)
    ways = [[(-1, 11, 11), (11, 21, 21), (21, 31, 31), (31, 38, 38)], [(-1, 11, 11)], [], [(-1, 5, 5)]]
    for position, way in enumerate(ways):
        want = by_hand(pipe, clean, states, way)
        torch.testing.assert_close(found[:, position].double(), want, rtol=WALK, atol=WALK)


@pytest.mark.parametrize("family", ["sd15", "sd21"])
@torch.no_grad()
def test_exact_denoising(family):
    """From 30, exactly, by diffusers' own DDIM scheduler, a timestep at a time; one way passes all that are asked."""
    pipe, model = made(family)
    images, asked = pictures(2), [25, 0, 28]
    found = FeatureExtractor(model, ["unet-in"], asked, technique=Technique(denoise_from=30), draws=2, keep_draws=True)
    found = found.extract(images, seed=3)["unet-in"]
    states = pipe.encode_prompt("", "cpu", 1, False)[0].expand(2, -1, -1)
    clean = latents_of(pipe, images)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    for draw in range(2):
        z = scheduler.add_noise(clean, noise(3, draw, (4, 16, 16)).expand(2, -1, -1, -1), torch.tensor([30, 30]))
        passed = {0: clean}
        for t in range(30, 24, -1):
            passed[t] = z
            z = scheduler.step(pipe.unet(z, t, states).sample, t, z).prev_sample
        for position, t in enumerate(asked):
            torch.testing.assert_close(found[:, position, draw], passed[t], rtol=WALK, atol=WALK)


def drawn(count):
    """Pictures with edges."""
    return [Image.fromarray(scene(number).image) for number in range(count)]


def tiny_controlnet(family, seed):
    """A trained-like ControlNet for pictures of the VAE's size, whose output convolutions are not 0."""
    levels = {"sd15": 3, "sd21": 4, "sdxl": 2}[family]
    net = ControlNetModel.from_unet(tiny_unet(family), conditioning_embedding_out_channels=(8,) * levels)
    return trained_like(net, seed)


@pytest.mark.parametrize(
    ("family", "way"), [*((family, {}) for family in FAMILIES), ("sd15", {"denoise_from": 53})], ids=str
)
def test_controls(family, way):
    """Two nets, of which one sees edges and one the picture itself, for two images with a prompt each."""
    pipe, model = made(family)
    images = drawn(2)
    size = 16 * pipe.vae_scale_factor
    resized = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    shown = [[canny(image) for image in resized], resized]
    conditions = [
        torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1).float() / 255 for each in some])
        for some in shown
    ]
    assert all(condition.std() > 0 for condition in conditions)
    nets = [tiny_controlnet(family, seed) for seed in (1, 2)]
    technique = Technique(controls=[Control(nets[0]), Control(nets[1], condition=None)], **way)
    common = {"layers": LAYERS, "timesteps": [50], "official_timesteps": True, "prompts": PROMPTS[:2], **way}
    controls = list(zip(nets, conditions, strict=True))
    want = reference.extract(pipe, [], **common, controls=controls, latents=latents_of(pipe, images))
    plain = reference.extract(pipe, [], **common, latents=latents_of(pipe, images))
    extractor = FeatureExtractor(model, LAYERS, [50], official_timesteps=True, technique=technique)
    found = extractor.extract(images, PROMPTS[:2])
    close(found, want, WALK if way else 1e-5)
    assert (want[LAYERS[0]] - plain[LAYERS[0]]).abs().max() > 0.05 * plain[LAYERS[0]].abs().max()


def test_the_mini_model_equals_its_stock_pipeline():
    model = dsd.load("mini")
    extractor = FeatureExtractor(model, timesteps=[50, 400], attention=["up_cross"])
    want = reference.extract(
        model.to_pipeline(), pictures(2), layers=extractor.layers[:-1], timesteps=[50, 400], attention=["up_cross"]
    )
    close(extractor.extract(pictures(2)), want, 3e-5)


def test_arguments_have_the_same_names():
    """What the reference has besides: a pipeline, and what feeds both sides the same randomness."""
    ours = {*inspect.signature(FeatureExtractor).parameters, *inspect.signature(FeatureExtractor.extract).parameters}
    ours |= set(inspect.signature(Technique).parameters)
    own = {"pipe", "batch_size", "latents", "noise", "feature_resize"}
    parameters = inspect.signature(reference.extract).parameters
    assert set(parameters) - ours == own
    for kind in (FeatureExtractor, FeatureExtractor.extract, Technique):
        for name, parameter in inspect.signature(kind).parameters.items():
            if name in parameters and name not in ("layers", "prompts"):
                assert parameters[name].default == parameter.default, name
    assert parameters["prompts"].default == inspect.signature(FeatureExtractor.extract).parameters["prompts"].default


def test_extraction_leaves_the_pipeline_as_it_was():
    pipe, model = made("sd15")
    before, weights = dict(pipe.unet.attn_processors), copy.deepcopy(pipe.unet.state_dict())
    FeatureExtractor(model, "all", attention=["up_cross"]).extract(pictures(1))
    assert all(pipe.unet.attn_processors[name] is before[name] for name in before)
    assert all(torch.equal(value, weights[name]) for name, value in pipe.unet.state_dict().items())
    assert not any(module._forward_hooks for module in pipe.unet.modules())
