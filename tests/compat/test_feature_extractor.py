"""The official feature extractor: its signature, its values, and what is right here that is not there."""

import gc
import inspect
import json
import weakref

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

import dsd_fast as dsd
from dsd_fast.compat import FeatureExtractor
from dsd_fast.images.canny import canny
from dsd_fast.models.controlnet import Control
from dsd_fast.models.lora import save_lora
from dsd_fast.reference import features as reference
from dsd_fast.reference.features_tapping import aggregated, tapping
from tests.tiny import tiny_pipeline, trained_like

VERSION = {"sd15": "1-5", "sd21": "2-1", "sdxl": "xl"}
SIDE = {"sd15": 64, "sd21": 128, "sdxl": 32}
# Not in the order of execution.
LAYERS = {
    "up-level1-repeat0-vit-block0-cross-q": True,
    "mid-vit-block0-self-k": True,
    "up-level0-repeat0-res-increment": False,
    "down-level1-repeat0-res-increment": True,
    "up-level1-repeat0-vit-block0-ffn-inner": True,
}
ORDERED = ["down-level1-repeat0-res-increment", "mid-vit-block0-self-k", "up-level1-repeat0-vit-block0-cross-q"]
ORDERED.append("up-level1-repeat0-vit-block0-ffn-inner")
PROMPT = "a red circle left of a blue square"

# Rounding to float16 is 2^-11 of a value. Networks are float64: what is rounded to float32 are the pixels, the noise
# and its factors, which ten times enlarged is 1e-5 of the largest value, some 10. (In float32 the mini model's middle
# differs by ten times that at single positions.)
NEAR = {"rtol": 2**-11, "atol": 1e-4}
# Of two values that are both rounded.
BOTH = {"rtol": 2**-10, "atol": 1e-4}


def pictures(count=2, height=50, width=40, seed=0):
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def mini():
    return dsd.load("mini", dtype="float64")


@pytest.fixture(scope="module")
def extractor(mini):
    return FeatureExtractor(LAYERS, "mini", "cpu", img_size=64, external_model=mini)


def assert_near(found, expected):
    """Of {id: (B, …)} and the reference's {id: (B, 1, …)}."""
    assert list(found) == list(expected)
    for name, value in found.items():
        assert value.dtype == torch.float16
        torch.testing.assert_close(value.double(), expected[name][:, 0].double(), **NEAR)


def test_signatures_are_the_official_ones():
    def signature(method):
        parameters = list(inspect.signature(method).parameters.values())
        return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}

    needed = inspect.Parameter.empty
    assert signature(FeatureExtractor) == {
        "layer": needed,
        "version": needed,
        "device": needed,
        "dtype": "float16",
        "img_size": 1024,
        "offline_lora": None,
        "offline_lora_filename": None,
        "feature_resize": 1,
        "control": None,
        "attention": None,
        "train_unet": False,
        "external_model": None,
    }
    assert signature(FeatureExtractor.extract) == {
        "prompts": needed,
        "batch_size": needed,
        "image": needed,
        "image_type": "image",
        "t": 50,
        "denoising_from": None,
        "use_control": False,
        "use_ddim_inversion": False,
    }
    assert signature(FeatureExtractor.encode_prompt) == {"prompt_str": None, "prompt_file": None}
    assert signature(FeatureExtractor.preprocess_image) == {"x": needed, "is_tensor": False}
    assert signature(FeatureExtractor.offload_prompt_encoder) == {"persistent": False}
    assert signature(FeatureExtractor.set_background_extraction) == {"idxs": needed}


@pytest.mark.parametrize("family", VERSION)
@pytest.mark.newest
def test_features_are_those_of_the_plain_way(family):
    stock, side = tiny_pipeline(family).to(torch.float64), SIDE[family]
    extractor = FeatureExtractor(
        LAYERS, VERSION[family], "cpu", img_size=side, attention=["up_cross", "down_self"], external_model=stock
    )
    assert extractor.pipe is stock
    images = pictures()
    found = extractor.extract(extractor.encode_prompt(PROMPT), 2, images, t=50, seed=3)
    expected = reference.extract(
        stock,
        images,
        layers=ORDERED,
        timesteps=(50,),
        prompts=PROMPT,
        seed=3,
        attention=("up_cross", "down_self"),
        official_timesteps=True,
    )
    assert list(found) == [*ORDERED, "attn"]
    assert_near(found, expected)
    # The official timestep is another than the one asked for, save with SDXL.
    exact = reference.extract(stock, images, layers=ORDERED[2:3], timesteps=(50,), prompts=PROMPT, seed=3)
    same = torch.allclose(found[ORDERED[2]].double(), exact[ORDERED[2]][:, 0], **NEAR)
    assert same == (family == "sdxl")


@pytest.mark.parametrize("way", ["denoising_from", "far", "use_ddim_inversion", "clean"])
def test_other_ways_to_the_timestep(extractor, mini, way):
    stock, images = mini.to_pipeline(), pictures()
    ours, theirs, t = {
        "denoising_from": ({"denoising_from": 53}, {"denoise_from": 53}, 50),
        "far": ({"denoising_from": 120}, {"denoise_from": 120}, 60),
        "use_ddim_inversion": ({"use_ddim_inversion": True}, {"inversion": True}, 25),
        "clean": ({}, {}, 0),
    }[way]
    found = extractor.extract(extractor.encode_prompt(PROMPT), 2, images, t=t, **ours)
    expected = reference.extract(
        stock, images, layers=ORDERED, timesteps=(t,), prompts=PROMPT, official_timesteps=True, batch_size=2, **theirs
    )
    assert_near(found, expected)


def test_controlnets_take_part_when_asked(mini):
    stock, images = mini.to_pipeline(), pictures()
    net = diffusers.ControlNetModel.from_unet(mini.unet, conditioning_embedding_out_channels=(8, 16, 16))
    trained_like(net, 0).double()
    extractor = FeatureExtractor(LAYERS, "mini", "cpu", img_size=64, control=[Control(net)], external_model=mini)
    prompt = extractor.encode_prompt(PROMPT)
    edges = [np.asarray(canny(each.resize((64, 64)))) for each in images]
    condition = torch.from_numpy(np.stack(edges)).permute(0, 3, 1, 2) / 255
    options = {"layers": ORDERED, "timesteps": (50,), "prompts": PROMPT, "official_timesteps": True, "batch_size": 2}
    plain = extractor.extract(prompt, 2, images)
    assert_near(plain, reference.extract(stock, images, **options))
    found = extractor.extract(prompt, 2, images, use_control=True, denoising_from=52)
    expected = reference.extract(stock, images, controls=[(net, condition)], denoise_from=52, **options)
    assert_near(found, expected)
    assert (found[ORDERED[2]] - plain[ORDERED[2]]).abs().max() > 0.1


def test_features_are_made_smaller_but_attention_is_not(mini):
    images = pictures()
    extractor = FeatureExtractor(
        LAYERS, "mini", "cpu", img_size=64, feature_resize=3, attention=["up_cross"], external_model=mini
    )
    found = extractor.extract(extractor.encode_prompt(PROMPT), 2, images)
    expected = reference.extract(
        mini.to_pipeline(),
        images,
        layers=ORDERED,
        prompts=PROMPT,
        attention=["up_cross"],
        official_timesteps=True,
        feature_resize=3,
    )
    assert found["attn"].shape[-2:] == (16, 16)
    # 8 positions in a side become 8 // 3.
    assert found[ORDERED[2]].shape[-2:] == (2, 2)
    assert_near(found, expected)


def test_layers_are_read_from_the_official_files(mini, tmp_path):
    file = tmp_path / "layers.json"
    file.write_text(json.dumps({**LAYERS, "attn": True, "mid-vit-block0-cross-k": True, "vae-out": False}))
    for given in (file, str(file)):
        assert FeatureExtractor(given, "mini", "cpu", img_size=64, external_model=mini).layers == tuple(ORDERED)
    everything = dsd.unet.UNetProgram(mini.unet).layer_ids
    for given in (None, {}):
        assert FeatureExtractor(given, "mini", "cpu", img_size=64, external_model=mini).layers == everything
    attention = FeatureExtractor({"attn": False}, "mini", "cpu", 64, attention=["up_cross"], external_model=mini)
    assert attention.layers == ()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_prompts_are_encoded_as_by_the_pipeline(family, tmp_path):
    stock = tiny_pipeline(family)
    extractor = FeatureExtractor(LAYERS, VERSION[family], "cpu", img_size=SIDE[family], external_model=stock)
    (tmp_path / "prompt.txt").write_text(f"{PROMPT}\n")
    expected = stock.encode_prompt(
        prompt=PROMPT, device="cpu", num_images_per_prompt=1, negative_prompt="", do_classifier_free_guidance=True
    )
    for found in (extractor.encode_prompt(PROMPT), extractor.encode_prompt(prompt_file=tmp_path / "prompt.txt")):
        assert len(found) == 4
        for value, wanted in zip(found, (*expected, None, None), strict=False):
            assert (value is None) == (wanted is None)
            if value is not None:
                torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6)


def test_each_image_can_have_its_own_states(extractor):
    images = pictures()
    prompts = [extractor.encode_prompt(text) for text in (PROMPT, "a photo of the digit three")]
    alone = [extractor.extract(prompt, 1, [image]) for prompt, image in zip(prompts, images, strict=True)]
    states = torch.cat([prompt.prompt_embeds for prompt in prompts])
    both = extractor.extract([states, None, None, None], 2, images)
    for name in ORDERED:
        torch.testing.assert_close(both[name], torch.cat([each[name] for each in alone]), **BOTH)
    other = extractor.extract(prompts[1], 1, images[:1])
    assert (other[ORDERED[3]] - alone[0][ORDERED[3]]).abs().max() > 1e-2


def test_long_prompts_are_encoded_in_whole_pieces(extractor, mini):
    words = "a small red circle left of a large blue square above a green ring and a yellow cross below a cyan triangle"
    limit = mini.tokenizers[0].model_max_length
    prompt = extractor.encode_prompt(f"{words} {words}")
    pieces = prompt.prompt_embeds.shape[1] // limit
    assert prompt.prompt_embeds.shape == prompt.negative_prompt_embeds.shape == (1, pieces * limit, 128)
    # Every word is there once, in order, in pieces that the encoder takes whole.
    split, rest = [], f"{words} {words}".split()
    while rest:
        count = max(
            n for n in range(1, len(rest) + 1) if len(mini.tokenizers[0](" ".join(rest[:n])).input_ids) <= limit
        )
        split, rest = [*split, " ".join(rest[:count])], rest[count:]
    assert len(split) == pieces >= 2
    torch.testing.assert_close(prompt.prompt_embeds[0], mini.encode_prompts(split).states.flatten(0, 1))
    # The network sees all of it.
    image = pictures(1)
    found = extractor.extract(prompt, 1, image, t=0)
    kept = {}
    block = mini.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    handle = block.to_k.register_forward_hook(lambda _, __, out: kept.update(k=out))
    clean = mini.encode_images(torch.cat([extractor.preprocess_image(each) for each in image]))
    with torch.no_grad():
        mini.unet(clean, 0, prompt.prompt_embeds)
    handle.remove()
    expected = kept["k"].transpose(1, 2).reshape(1, -1, 4, 4)
    torch.testing.assert_close(found["mid-vit-block0-self-k"].double(), expected, **NEAR)


def test_tensors_are_taken_as_the_pictures_they_are(extractor):
    images = pictures(height=64, width=64)
    prompt = extractor.encode_prompt("")
    pixels = torch.cat([extractor.preprocess_image(each) for each in images])
    assert pixels.shape == (2, 3, 64, 64)
    values = torch.from_numpy(np.stack([np.asarray(each) for each in images])).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(extractor.preprocess_image(values, is_tensor=True), pixels, rtol=0, atol=1e-6)
    expected = extractor.extract(prompt, 2, images)
    found = extractor.extract(prompt, 2, pixels, image_type="tensors")
    assert all(torch.equal(found[name], expected[name]) for name in ORDERED)
    # A flat picture stays itself at any size.
    flat = torch.full((1, 3, 32, 48), 2 * 51 / 255 - 1)
    resized = extractor.extract(prompt, 1, flat, image_type="tensors")
    picture = extractor.extract(prompt, 1, [Image.new("RGB", (64, 64), (51, 51, 51))])
    assert all(torch.equal(resized[name], picture[name]) for name in ORDERED)


def test_seeds_decide_the_noise(extractor):
    images, prompt = pictures(1), extractor.encode_prompt("")
    found = [extractor.extract(prompt, 1, images, t=300, seed=seed)[ORDERED[0]] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 0.1


def test_features_are_taken_while_a_pipeline_generates(mini):
    stock = mini.to_pipeline()
    stock.set_progress_bar_config(disable=True)

    def generate():
        generator = torch.Generator().manual_seed(0)
        return stock(PROMPT, num_inference_steps=3, generator=generator, output_type="np").images

    kept, modules = (
        {},
        {
            "up-level0-repeat1-res-out": mini.unet.up_blocks[0].resnets[1],
            "up-level1-repeat0-vit-block0-cross-q": mini.unet.up_blocks[1]
            .attentions[0]
            .transformer_blocks[0]
            .attn2.to_q,
        },
    )
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: kept.setdefault(name, []).append(out))
        for name, module in modules.items()
    ]
    plain = generate()
    for handle in handles:
        handle.remove()

    extractor = FeatureExtractor(dict.fromkeys(modules, True), "mini", "cpu", img_size=64, external_model=stock)
    assert extractor.get_background_extraction() == {}
    extractor.set_background_extraction([1, 3, 99])
    assert np.array_equal(generate(), plain)
    found = extractor.get_background_extraction()
    assert {name: list(values) for name, values in found.items()} == {name: [1, 3] for name in modules}
    for name, values in found.items():
        for call, value in values.items():
            expected = kept[name][call - 1]
            if expected.ndim == 3:
                expected = expected.transpose(1, 2).reshape(len(expected), -1, *value.shape[2:])
            # With guidance two rows for the one picture.
            assert value.shape[0] == 2
            assert value.dtype == torch.float16
            torch.testing.assert_close(value.double(), expected, **NEAR)
    # Meanwhile the extractor itself works, and goes on counting afterwards.
    images, prompt = pictures(1), extractor.encode_prompt("")
    extractor.extract(prompt, 1, images)
    assert mini.unet._forward_pre_hooks
    # Counting begins anew.
    extractor.set_background_extraction([2])
    generate()
    assert all(list(values) == [2] for values in extractor.get_background_extraction().values())
    extractor.set_background_extraction([1])
    with pytest.raises(ValueError, match="cross_attention_kwargs"):
        stock(PROMPT, num_inference_steps=1, cross_attention_kwargs={"scale": 0.5})
    extractor.set_background_extraction(None)
    assert not mini.unet._forward_pre_hooks
    assert extractor.get_background_extraction() == {}


@pytest.mark.parametrize(("layer", "side"), [({"attn": True}, 64), ({"attn": True, ORDERED[0]: True}, 48)])
def test_attention_is_taken_while_a_pipeline_generates(mini, layer, side):
    stock = mini.to_pipeline()
    stock.set_progress_bar_config(disable=True)
    places, size, seen = ("up_cross", "down_self"), (side // 4, side // 4), []

    def generate():
        generator = torch.Generator().manual_seed(0)
        stock(PROMPT, num_inference_steps=2, generator=generator, height=side, width=side, output_type="latent")

    handle = mini.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    generate()
    handle.remove()
    args, kwargs = seen[1]
    # Of a quarter to a half of the latents' side.
    with torch.no_grad(), tapping(mini.unet, (), places, ((side // 16) ** 2, (side // 8) ** 2)) as tapped:
        mini.unet(*args, **kwargs)
        expected = aggregated(tapped.attention, places, size)

    extractor = FeatureExtractor(layer, "mini", "cpu", img_size=64, attention=places, external_model=stock)
    extractor.set_background_extraction([2])
    generate()
    found = extractor.get_background_extraction()
    extractor.set_background_extraction(None)
    assert {name: list(values) for name, values in found.items()} == {name: [2] for name in layer}
    # With guidance two rows for the one picture.
    assert found["attn"][2].shape == (2, *expected.shape[1:])
    torch.testing.assert_close(found["attn"][2].double(), expected.double(), **NEAR)


def test_the_encoders_can_be_let_go():
    extractor = FeatureExtractor(LAYERS, "mini", "cpu", "float32", 64)
    images, prompt = pictures(1), extractor.encode_prompt(PROMPT)
    expected = extractor.extract(prompt, 1, images)
    extractor.offload_prompt_encoder()
    encoder = weakref.ref(extractor.model.text_encoders[0])
    assert torch.equal(extractor.encode_prompt(PROMPT).prompt_embeds, prompt.prompt_embeds)
    extractor.offload_prompt_encoder(persistent=True)
    extractor.offload_prompt_encoder()
    gc.collect()
    assert encoder() is None
    assert torch.equal(extractor.extract(prompt, 1, images)[ORDERED[0]], expected[ORDERED[0]])
    # A setting that was not used before, too.
    extractor.extract(prompt, 1, images, t=10)
    with pytest.raises(ValueError, match="let go"):
        extractor.encode_prompt(PROMPT)


def test_an_offline_lora_is_active(tmp_path):
    own = dsd.load("mini")
    own.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]), "x")
    save_lora(own.unet, "x", tmp_path / "lora.safetensors")
    images = pictures(1)
    extractor = FeatureExtractor(LAYERS, "mini", "cpu", "float32", 64, str(tmp_path), "lora.safetensors")
    found = extractor.extract(extractor.encode_prompt(PROMPT), 1, images)
    same = FeatureExtractor(LAYERS, "mini", "cpu", img_size=64, external_model=own)
    expected = same.extract(same.encode_prompt(PROMPT), 1, images)
    own.unet.disable_adapters()
    plain = same.extract(same.encode_prompt(PROMPT), 1, images)
    torch.testing.assert_close(found[ORDERED[2]], expected[ORDERED[2]], **BOTH)
    assert (found[ORDERED[2]] - plain[ORDERED[2]]).abs().max() > 1e-2


def test_what_cannot_be_done_is_said_by_name(mini):
    def make(*args, **options):
        return FeatureExtractor(*args, **({"external_model": mini, "img_size": 64} | options))

    for version in ("pixart-sigma", "pixart-alpha", "pixart-sigma-512", "if", "hunyuan", "flux"):
        for external in (None, mini):
            with pytest.raises(NotImplementedError, match=f"version: '{version}'"):
                make(LAYERS, version, "cpu", external_model=external)
    cases = [
        ({"train_unet": True}, "train_unet"),
        ({"control": ["depth"]}, "control: 'depth'"),
        ({"layer": {"vae-out": True}}, "layer: 'vae-out'"),
    ]
    for options, message in cases:
        with pytest.raises(NotImplementedError, match=message):
            make(**({"layer": LAYERS, "version": "mini", "device": "cpu"} | options))


def test_bad_input_is_named(mini, extractor, tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    settings = [
        ({"version": "3-5"}, "version: got '3-5'"),
        ({"version": "xl"}, "version: got 'xl', but the model is of family 'sd1'"),
        ({"version": "3-5", "external_model": None}, "version: got '3-5'"),
        ({"dtype": "int8", "external_model": None}, "dtype: got 'int8'"),
        ({"offline_lora_filename": "x", "external_model": None}, "offline_lora_filename: given without"),
        ({"offline_lora": "x"}, "offline_lora: got 'x', but an external model"),
        ({"device": "cuda"}, "device"),
        ({"img_size": 63}, "image_size: got"),
        ({"feature_resize": 0}, "feature_resize: got 0"),
        ({"feature_resize": 2, "layer": {"mid-vit-block0-cross-map": True}}, "feature_resize: attention maps"),
        ({"control": "canny"}, "control: got the str 'canny'"),
        ({"control": ["pose"]}, "control: got 'pose'"),
        ({"attention": ["cross"]}, "attention: got 'cross'"),
        ({"layer": {"up-level9-repeat0-res-out": True}}, "up-level9-repeat0-res-out"),
        ({"layer": ["mid-vit-out"]}, "layer: got list"),
        ({"layer": str(tmp_path / "list.json")}, "no object of layer ids"),
        ({"layer": {"attn": True}}, "layers: got none"),
    ]
    for options, message in settings:
        with pytest.raises(ValueError, match=message):
            FeatureExtractor(
                **(
                    {"layer": LAYERS, "version": "mini", "device": "cpu", "img_size": 64, "external_model": mini}
                    | options
                )
            )
    images, prompt = pictures(), extractor.encode_prompt("")
    maps = FeatureExtractor({"mid-vit-block0-cross-map": True}, "mini", "cpu", img_size=64, external_model=mini)
    calls = [
        (lambda: extractor.encode_prompt(), "exactly one"),
        (lambda: extractor.encode_prompt("a", "b"), "exactly one"),
        (lambda: extractor.encode_prompt(["a"]), "prompt_str: got list"),
        (lambda: extractor.encode_prompt("x" * 200), "tokens"),
        (lambda: extractor.extract("a", 2, images), "prompts: expected what encode_prompt"),
        (lambda: extractor.extract(prompt[:2], 2, images), "prompts: expected what encode_prompt"),
        (lambda: extractor.extract((prompt[0].expand(3, -1, -1), None, None, None), 2, images), r"\(2, T, E\)"),
        (lambda: extractor.extract(prompt, 3, images), "batch_size: got 3, but image holds 2"),
        (lambda: extractor.extract(prompt, 1, images[0]), "image: got Image, expected a sequence"),
        (lambda: extractor.extract(prompt, 1, images, image_type="array"), "image_type: got 'array'"),
        (lambda: extractor.extract(prompt, 1, torch.ones(1, 3, 8, 8) * 2, image_type="tensors"), "image: spans 2"),
        (lambda: extractor.extract(prompt, 1, torch.ones(3, 8, 8), image_type="tensors"), "image: got"),
        (lambda: extractor.preprocess_image(-torch.ones(1, 3, 8, 8), is_tensor=True), "x: spans -1"),
        (lambda: extractor.extract(prompt, 2, images, t=1000), "timesteps"),
        (lambda: extractor.extract(prompt, 2, images, denoising_from=60, use_ddim_inversion=True), "denoise_from"),
        (lambda: extractor.set_background_extraction([0]), "idxs: got"),
        (lambda: maps.extract(maps.encode_prompt("a red ring " * 20), 2, images), "prompts: attention maps"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
