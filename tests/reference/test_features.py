"""The reference's features against numbers of the official code, and what the official way costs."""

import copy
import inspect
import json
import time
from collections import Counter
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from safetensors.torch import load_file

from dsd_fast.reference import features, inputs
from dsd_fast.reference.features_tapping import KINDS, tapping
from tests.reference.test_matching import noise_like, pictures
from tests.tiny import FAMILIES, tiny_pipeline, tiny_unet, trained_like

DATA = Path(__file__).parents[1] / "data/sd15like"
LAYERS = [
    "up-level1-repeat1-vit-block0-cross-q",
    "up-level1-repeat1-res-increment",
    "up-level0-upsampler-out",
    "mid-vit-out",
]


@pytest.fixture(scope="module")
def official():
    """A pipeline around the official network: its text and VAE are not asked."""
    config = json.loads((DATA / "config.json").read_text())
    pipe = tiny_pipeline("sd15")
    pipe.unet = diffusers.UNet2DConditionModel.from_config(config).eval()
    pipe.unet.load_state_dict(load_file(DATA / "diffusion_pytorch_model.safetensors"))
    return pipe, load_file(DATA / "dsd_scores.safetensors"), load_file(DATA / "features.safetensors")


@torch.no_grad()
@pytest.mark.newest
def test_activations_equal_the_official_codes(official):
    """Stored in half precision, whose relative error is 2⁻¹¹; values near 0 lose 2⁻²⁵ at the most, and float32 sums of
    another order 1e-5 of the largest."""
    pipe, given, stored = official
    names = [name.removeprefix("t50.") for name in stored if name != "t50.eps"]
    assert len(names) == 12
    with tapping(pipe.unet, [*names, "unet-out"]) as tapped:
        pipe.unet(given["latents"][:2], 50, given["cond"][:2])
    found = features.as_pictures(tapped.features, (16, 16))
    for name in names:
        want = stored[f"t50.{name}"].float()
        assert found[name].shape == want.shape, name
        atol = 1e-5 * float(want.abs().max()) + 2**-25
        torch.testing.assert_close(found[name], want, rtol=2**-11, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(found["unet-out"], stored["t50.eps"], rtol=1e-4, atol=1e-5)


def test_extract_is_one_noised_pass(official, monkeypatch):
    """Through `extract`, the same activations: the network's input is undone to the oracle's latents."""
    pipe, given, stored = official
    monkeypatch.setattr(features, "_texts", lambda *_: (given["cond"][:2], None))
    alpha = pipe.scheduler.alphas_cumprod[50]
    noise = noise_like(3, 0, (4, 16, 16))
    clean = (given["latents"][:2] - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    name = "up-level3-repeat0-vit-block0-self-k"
    found = features.extract(pipe, [], layers=[name], timesteps=[50], seed=3, latents=clean)[name]
    assert found.shape == (2, 1, 16, 16, 16)
    want = stored[f"t50.{name}"].float()
    torch.testing.assert_close(found[:, 0], want, rtol=2**-11, atol=2e-5 * float(want.abs().max()))


def test_the_networks_have_the_official_numbers_of_ids():
    """197 for SD 1.5's topology and 612 for SDXL's in the official files; tiny SDXL has fewer transformer blocks."""
    assert len(features.layer_ids(tiny_unet("sd15"))) == len(set(features.layer_ids(tiny_unet("sd15")))) == 197
    # 612 with blocks (0, 2, 10) on the way down, 10 in the middle and (10, 2, 0) up, 8 ids each with both maps.
    deep = 2 * 2 + 2 * 10 + 10 + 3 * 10 + 3 * 2
    tiny = 2 * 2 + 2 * 3 + 3 + 3 * 3 + 3 * 2
    assert len(features.layer_ids(tiny_unet("sdxl"))) == 612 - 8 * (deep - tiny)


@pytest.mark.parametrize(
    ("family", "used"),
    [("sd15", {50: 51, 60: 61, 0: 0}), ("sd21", {50: 49, 60: 59, 0: 0}), ("sdxl", {50: 50, 60: 60, 0: 0})],
)
def test_effective_timesteps(family, used):
    """METHODS' table, and the stock img2img pipeline's own `get_timesteps`."""
    pipe = tiny_pipeline(family)
    assert {t: features.effective_timestep(pipe, t) for t in used} == used
    kind = StableDiffusionXLImg2ImgPipeline if family == "sdxl" else StableDiffusionImg2ImgPipeline
    options = {} if family == "sdxl" else {"requires_safety_checker": False}
    img2img = kind(**pipe.components, **options)
    img2img.scheduler = copy.deepcopy(pipe.scheduler)
    img2img.scheduler.set_timesteps(1000)
    for t in (1, 7, 69, 261, 950, 999):
        arguments = (1000, t / 1000, "cpu")
        assert features.effective_timestep(pipe, t) == int(img2img.get_timesteps(*arguments)[0][0])
    latents = torch.randn(1, 4, 16, 16)
    mapped = features.extract(pipe, [], layers=LAYERS[:1], timesteps=[50], official_timesteps=True, latents=latents)
    plain = features.extract(pipe, [], layers=LAYERS[:1], timesteps=[used[50]], latents=latents)
    assert torch.equal(mapped[LAYERS[0]], plain[LAYERS[0]])


def counted(pipe):
    """Calls of the pipeline's networks, by name and rows, filled as they happen."""
    calls = Counter()

    def count(name):
        def hook(_, args, kwargs):
            calls[name, len(args[0] if args else kwargs.get("sample", kwargs.get("input_ids")))] += 1

        return hook

    for name in ("unet", "text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).register_forward_pre_hook(count(name), with_kwargs=True)
    pipe.vae.encoder.register_forward_pre_hook(count("vae"), with_kwargs=True)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_official_way_costs(family):
    pipe = tiny_pipeline(family)
    calls = counted(pipe)
    encoders = ["text_encoder", "text_encoder_2"] if family == "sdxl" else ["text_encoder"]
    N, S, D = 3, 2, 2
    features.extract(pipe, pictures(N), layers=LAYERS[:1], timesteps=[10, 20], draws=D)
    # Each text encoder: the prompt, and the empty text that nothing reads.
    assert calls == {("unet", 1): N * S * D, ("vae", 1): N * S * D, **{(name, 1): 2 for name in encoders}}
    calls.clear()
    features.extract(pipe, pictures(N), layers=LAYERS[:1], timesteps=[10, 20], batch_size=2, prompts=["a", "b", "c"])
    assert calls == {
        **{(name, rows): S for name in ("unet", "vae") for rows in (2, 1)},
        **{(name, 1): 2 * N for name in encoders},
    }
    calls.clear()
    features.extract(pipe, [], layers=LAYERS[:1], timesteps=[10], latents=torch.randn(N, 4, 16, 16))
    assert calls == {("unet", 1): N, **{(name, 1): 2 for name in encoders}}


@pytest.mark.alone
def test_extraction_spends_its_time_in_the_modules(monkeypatch):
    pipe = tiny_pipeline("sd15")
    pipe.unet.register_to_config(sample_size=32)
    inside = 0.0

    def timed(function):
        def call(*args, **kwargs):
            nonlocal inside
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                inside += time.process_time() - start

        return call

    # On the instances; hooks would count themselves.
    monkeypatch.setattr(pipe.unet, "forward", timed(pipe.unet.forward))
    monkeypatch.setattr(pipe.vae, "encode", timed(pipe.vae.encode))
    monkeypatch.setattr(pipe.text_encoder, "forward", timed(pipe.text_encoder.forward))

    def share_outside() -> float:
        nonlocal inside
        inside = 0.0
        start = time.process_time()
        features.extract(pipe, images, layers=LAYERS, timesteps=range(50, 450, 50))
        return 1 - inside / (time.process_time() - start)

    images = pictures(1)
    share_outside()
    # Processor time of this process: what neighbours do costs nothing, and the smallest of three leaves out the rest.
    assert min(share_outside() for _ in range(3)) < 0.10


def test_draws_seeds_and_batches():
    pipe, latents = tiny_pipeline("sd15"), torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    common = {"layers": LAYERS, "timesteps": [300], "latents": latents}
    kept = features.extract(pipe, [], **common, draws=2, keep_draws=True, seed=5)
    mean = features.extract(pipe, [], **common, draws=2, seed=5)
    for d in range(2):
        alone = features.extract(pipe, [], **common, noise=noise_like(5, d, (4, 16, 16))[None])
        for name in LAYERS:
            assert torch.equal(kept[name][:, :, d], alone[name])
    for name in LAYERS:
        torch.testing.assert_close(mean[name], kept[name].mean(2))
        assert (kept[name][:, :, 0] - kept[name][:, :, 1]).abs().max() > 0.1
    each = features.extract(pipe, [], **common, seeds=[5, 6, 7])
    for n, seed in enumerate((5, 6, 7)):
        alone = features.extract(pipe, [], **{**common, "latents": latents[n : n + 1]}, seed=seed)
        for name in LAYERS:
            assert torch.equal(each[name][n], alone[name][0])
    together = features.extract(pipe, [], **common, seed=5, batch_size=3, prompts=["a dog", "", "cats"])
    for n, prompt in enumerate(("a dog", "", "cats")):
        alone = features.extract(pipe, [], **{**common, "latents": latents[n : n + 1]}, seed=5, prompts=prompt)
        for name in LAYERS:
            torch.testing.assert_close(together[name][n], alone[name][0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_t_0_is_the_clean_latent():
    pipe, latents = tiny_pipeline("sd15"), torch.randn(1, 4, 16, 16)
    for options in ({}, {"official_timesteps": True}, {"inversion": True}, {"denoise_from": 60}):
        found = features.extract(pipe, [], layers=["unet-in", "unet-out"], timesteps=[0], latents=latents, **options)
        assert torch.equal(found["unet-in"][:, 0], latents)
        states = pipe.encode_prompt("", "cpu", 1, False)[0]
        torch.testing.assert_close(found["unet-out"][:, 0], pipe.unet(latents, 0, states).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_is_aggregated_as_officially():
    """Sides 8 and 4 of latents 16 × 16, three layers each on the way up, from the maps by id."""
    pipe, latents = tiny_pipeline("sd15"), torch.randn(2, 4, 16, 16)
    kinds = ("up_cross", "down_self")
    maps = [f"up-level{level}-repeat{r}-vit-block0-cross-map" for level in (1, 2) for r in range(3)]
    maps += [f"down-level{level}-repeat{r}-vit-block0-self-map" for level in (1, 2) for r in range(2)]
    found = features.extract(pipe, [], layers=maps, attention=kinds, latents=latents, batch_size=2)
    assert list(found) == [*maps, "attn"]
    assert found["attn"].shape == (2, 1, 77 + 77 + 64 + 16, 16, 16)
    parts = []
    for names in (maps[:3], maps[3:6], maps[6:8], maps[8:]):
        mean = torch.stack([found[name][:, 0].mean(1) for name in names]).mean(0)
        side = int(mean.shape[1] ** 0.5)
        parts.append(F.interpolate(mean.transpose(1, 2).reshape(2, -1, side, side), (16, 16)))
    assert [part.shape[1] for part in parts] == [77, 77, 64, 16]
    torch.testing.assert_close(found["attn"][:, 0], torch.cat(parts, 1))
    # Probabilities: over the keys of each size they sum to 1.
    torch.testing.assert_close(found["attn"][:, 0, :77].sum(1), torch.ones(2, 16, 16))


def test_feature_resize_pools():
    pipe, latents = tiny_pipeline("sd15"), torch.randn(1, 4, 16, 16)
    common = {"layers": LAYERS[:2], "latents": latents, "attention": ["mid_self", "up_cross"]}
    full, half = features.extract(pipe, [], **common), features.extract(pipe, [], **common, feature_resize=2)
    for name in LAYERS[:2]:
        torch.testing.assert_close(half[name][0], F.adaptive_avg_pool2d(full[name][0], (2, 2)))
    assert torch.equal(half["attn"], full["attn"])


def tiny_controlnet(family, seed):
    """A trained-like ControlNet, whose output convolutions are not 0, for pictures of twice the latents' size."""
    unet = tiny_unet(family)
    net = ControlNetModel.from_unet(unet, conditioning_channels=3, conditioning_embedding_out_channels=(8, 8))
    return trained_like(net, seed)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_controls_are_added(family):
    """Residuals of two nets in the place where the stock UNet wants them, for each row its own."""
    pipe, latents = tiny_pipeline(family), torch.randn(2, 4, 16, 16)
    nets = [tiny_controlnet(family, seed) for seed in (1, 2)]
    conditions = [torch.rand(2, 3, 32, 32) for _ in nets]
    controls = list(zip(nets, conditions, strict=True))
    common = {"layers": ["mid-repeat1-res-out", *LAYERS], "timesteps": [80]}
    both = features.extract(pipe, [], **common, latents=latents, batch_size=2, controls=controls)
    plain = features.extract(pipe, [], **common, latents=latents)
    # The middle's residual is added behind its last block.
    torch.testing.assert_close(both["mid-repeat1-res-out"], plain["mid-repeat1-res-out"], rtol=1e-4, atol=1e-4)
    assert (both["up-level0-upsampler-out"] - plain["up-level0-upsampler-out"]).abs().max() > 0.1
    for n in range(2):
        own = [(net, condition[n : n + 1]) for net, condition in controls]
        alone = features.extract(pipe, [], **common, latents=latents[n : n + 1], controls=own)
        for name in LAYERS:
            torch.testing.assert_close(both[name][n], alone[name][0], rtol=1e-4, atol=1e-4)
    swapped = features.extract(pipe, [], **common, latents=latents, batch_size=2, controls=controls[::-1])
    torch.testing.assert_close(swapped[LAYERS[0]], both[LAYERS[0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "updates"), [("sd15", 11), ("sd21", 9), ("sdxl", 10)])
def test_denoising_takes_the_schedulers_steps(family, updates):
    """From 60 to 50: METHODS' 11 updates with PNDM and 9 with Euler, ControlNet in each, and then exactly t = 50."""
    pipe, latents = tiny_pipeline(family), torch.randn(1, 4, 16, 16)
    net = tiny_controlnet(family, 1)
    control = [(net, torch.rand(1, 3, 32, 32))]
    seen = {"unet": [], "net": []}
    pipe.unet.register_forward_pre_hook(lambda _, args: seen["unet"].append((float(args[1]), args[0])))
    net.register_forward_pre_hook(lambda _, args: seen["net"].append((float(args[1]), args[0])))
    features.extract(pipe, [], layers=["unet-in"], timesteps=[50], latents=latents, denoise_from=60, controls=control)
    first = {"sd15": 61, "sd21": 59, "sdxl": 60}[family]
    assert [t for t, _ in seen["unet"]] == [t for t, _ in seen["net"]] == list(range(first, 49, -1))
    assert len(seen["unet"]) == updates + 1
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen["unet"], seen["net"], strict=True))
    alpha = pipe.scheduler.alphas_cumprod[first]
    begun = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise_like(0, 0, (4, 16, 16))
    torch.testing.assert_close(seen["unet"][0][1], begun, rtol=1e-5, atol=1e-5)


def test_a_long_way_takes_every_tenth_step():
    pipe, latents, seen = tiny_pipeline("sd15"), torch.randn(1, 4, 16, 16), []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(int(args[1])))
    features.extract(pipe, [], layers=["unet-in"], timesteps=[50], latents=latents, denoise_from=150)
    assert seen == [151, 141, 131, 121, 111, 101, 91, 81, 71, 61, 51]


@torch.no_grad()
def test_a_euler_step_by_hand():
    """From 59 to 58 with SD 2.1's Euler: z/√ᾱ follows d(z/√ᾱ)/dσ = ε, σ = √((1 − ᾱ)/ᾱ)."""
    pipe, latents = tiny_pipeline("sd21"), torch.randn(1, 4, 16, 16)
    found = features.extract(pipe, [], layers=["unet-in"], timesteps=[58], latents=latents, denoise_from=60)
    states = pipe.encode_prompt("", "cpu", 1, False)[0]
    alpha, after = pipe.scheduler.alphas_cumprod[59], pipe.scheduler.alphas_cumprod[58]
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise_like(0, 0, (4, 16, 16))
    eps = pipe.unet(noised, 59, states).sample
    moved = noised / alpha.sqrt() + eps * (((1 - after) / after).sqrt() - ((1 - alpha) / alpha).sqrt())
    torch.testing.assert_close(found["unet-in"][:, 0], moved * after.sqrt(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_inversion_by_hand(prediction_type):
    """The grid 1, 11, 21, …: five passes at 11 … 51 for 50, each from ten timesteps below, then the usual pass."""
    pipe, latents = tiny_pipeline("sd15", prediction_type=prediction_type), torch.randn(2, 4, 16, 16)
    states = pipe.encode_prompt("", "cpu", 1, False)[0].expand(2, -1, -1)
    # The DDIM step as "keep ẑ₀ and ε̂, take the next level" (Song et al., arXiv 2010.02502, eq. 12 with σ = 0).
    expected = latents.double()
    for t in (11, 21, 31, 41, 51):
        alpha, after = (pipe.scheduler.alphas_cumprod[s].double() for s in (t - 10, t))
        output = pipe.unet(expected.float(), t, states).sample.double()
        if prediction_type == "epsilon":
            eps, clean = output, (expected - (1 - alpha).sqrt() * output) / alpha.sqrt()
        else:
            eps = alpha.sqrt() * output + (1 - alpha).sqrt() * expected
            clean = alpha.sqrt() * expected - (1 - alpha).sqrt() * output
        expected = after.sqrt() * clean + (1 - after).sqrt() * eps
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(int(args[1])))
    found = features.extract(
        pipe, [], layers=["unet-in"], timesteps=[50], latents=latents, inversion=True, batch_size=2
    )
    assert seen == [11, 21, 31, 41, 51, 50]
    # Five float32 predictions, each off by some 1e-5.
    torch.testing.assert_close(found["unet-in"][:, 0].double(), expected, rtol=1e-4, atol=1e-4)


def test_extraction_leaves_the_pipeline_as_it_was():
    pipe = tiny_pipeline("sd15")
    before, scheduler = dict(pipe.unet.attn_processors), copy.deepcopy(pipe.scheduler.__dict__)
    names = features.layer_ids(pipe.unet)
    features.extract(pipe, pictures(1), layers=names, attention=KINDS, denoise_from=70)
    assert all(pipe.unet.attn_processors[name] is before[name] for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    assert str(pipe.scheduler.__dict__) == str(scheduler)


def test_kinds_of_arguments():
    pipe = tiny_pipeline("sd15")
    assert inputs.latent_shape(pipe) == (4, 16, 16)
    by_ids = features.extract(pipe, pictures(1), layers=LAYERS[:2])
    by_file = features.extract(pipe, pictures(1), layers={LAYERS[0]: True, LAYERS[2]: False, LAYERS[1]: True})
    assert list(by_file) == LAYERS[:2]
    assert all(torch.equal(by_file[name], by_ids[name]) for name in by_ids)
    wide = features.extract(pipe, [], layers=LAYERS, latents=torch.randn(1, 4, 12, 9))
    assert wide[LAYERS[0]].shape == (1, 1, 32, 3, 3)
    assert wide["up-level0-upsampler-out"].shape[-2:] == (3, 3)
    half = features.extract(pipe.to(torch.float16), [], layers=LAYERS[:1], latents=torch.randn(1, 4, 16, 16), draws=2)
    assert half[LAYERS[0]].dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ["up-level0-vit-out"]}, "layers: unknown id 'up-level0-vit-out'"),
        ({"layers": ["up-level1-repeat0-vit-block0-cross-k"]}, "layers: unknown id"),
        ({"attention": ["up"]}, "attention: unknown kind 'up'"),
        ({"attention": ["mid_cross"]}, r"attention: got \('mid_cross',\), of which no layer"),
        ({"timesteps": [1000]}, r"timesteps: got \[1000\]"),
        ({"timesteps": []}, r"timesteps: got \[\]"),
        ({"timesteps": [60], "denoise_from": 50}, "denoise_from: got 50, expected at least the largest timestep, 60"),
        ({"prompts": ["a", "b"]}, "prompts: got 2, expected one or 1"),
        ({"prompts": "dog " * 80}, "prompts: 'dog .*' has 82 tokens, expected at most 77"),
        ({"seeds": [1, 2]}, "seeds: got 2, expected one for each of 1 images"),
        ({"noise": torch.zeros(4, 16, 16)}, r"noise: got shape \(4, 16, 16\), expected \(1, 4, 16, 16\)"),
        ({"images": []}, "images: got none"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    arguments = {"images": pictures(1), "layers": LAYERS[:1], **change}
    with pytest.raises(ValueError, match=message):
        features.extract(tiny_pipeline("sd15"), **arguments)


def test_signature_is_the_contract():
    parameters = inspect.signature(features.extract).parameters
    assert list(parameters)[:2] == ["pipe", "images"]
    assert {"layers", "timesteps", "prompts", "seed"} <= set(parameters)
    assert {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty} == {
        "timesteps": (50,),
        "prompts": "",
        "seed": 0,
        "seeds": None,
        "attention": (),
        "official_timesteps": False,
        "draws": 1,
        "keep_draws": False,
        "denoise_from": None,
        "inversion": False,
        "controls": (),
        "feature_resize": 1,
        "batch_size": 1,
        "latents": None,
        "noise": None,
    }
