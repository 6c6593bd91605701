"""The reference's DSD score against numbers of the official code and a second, float64 computation of its formula."""

import inspect
import json
import math
import time
from collections import Counter
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dsd_fast.reference import inputs, matching
from dsd_fast.reference.recording import recording
from tests.tiny import FAMILIES, tiny_pipeline

DATA = Path(__file__).parents[1] / "data/sd15like"
CAPTIONS = ["a red dog", "two cats on a blue mat", ""]

# The six layers of METHODS' rule written out: last block with cross-attention of each section, last transformer block.
SD_LAYERS = [
    "down_blocks.2.attentions.0.transformer_blocks.0.attn2",
    "down_blocks.2.attentions.1.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.3.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.3.attentions.1.transformer_blocks.0.attn2",
    "up_blocks.3.attentions.2.transformer_blocks.0.attn2",
]
SDXL_LAYERS = [
    "down_blocks.2.attentions.0.transformer_blocks.2.attn2",
    "down_blocks.2.attentions.1.transformer_blocks.2.attn2",
    "mid_block.attentions.0.transformer_blocks.2.attn2",
    "up_blocks.1.attentions.0.transformer_blocks.1.attn2",
    "up_blocks.1.attentions.1.transformer_blocks.1.attn2",
    "up_blocks.1.attentions.2.transformer_blocks.1.attn2",
]


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Smooth random pictures, wider than high."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (count, 5, 7, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize((90, 70), Image.Resampling.BICUBIC) for picture in small]


def noise_like(seed: int, k: int, shape: tuple[int, ...]) -> torch.Tensor:
    state = int(np.random.SeedSequence([seed, k]).generate_state(1, np.uint64)[0] >> 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(state))


def oracle_terms(family, prediction_type, image, caption, timesteps, seed):
    """(a_t, b_t) of a pair for each timestep: float64, every UNet row alone, scores from the hooked q and k."""
    pipe = tiny_pipeline(family, prediction_type=prediction_type).to(torch.float64)
    unet = pipe.unet
    captured = {}
    paths = SDXL_LAYERS if family == "sdxl" else SD_LAYERS
    for path in paths:
        layer = unet.get_submodule(path)
        for name in ("to_q", "to_k"):
            layer.get_submodule(name).register_forward_hook(
                lambda _, __, output, key=(path, name): captured.__setitem__(key, output[0])
            )
    side = 16 * pipe.vae_scale_factor
    pixels = torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BICUBIC))).double() / 255
    clean = pipe.vae.encode((2 * pixels - 1).permute(2, 0, 1)[None]).latent_dist.mean * pipe.vae.config.scaling_factor
    encoded = pipe.encode_prompt(
        prompt=caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    texts, pooled = (encoded[1], encoded[0]), encoded[3:1:-1]

    terms = []
    for k, t in enumerate(timesteps):
        alpha = pipe.scheduler.alphas_cumprod[t].double()
        eps = noise_like(seed, k, (4, 16, 16)).double()
        noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * eps
        layer_means, errors = [], []
        for row in range(2):
            added = None
            if family == "sdxl":
                ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float64)
                added = {"text_embeds": pooled[row], "time_ids": ids}
            output = unet(noised, t, texts[row], added_cond_kwargs=added).sample
            if prediction_type == "v_prediction":
                output = alpha.sqrt() * output + (1 - alpha).sqrt() * noised
            errors.append((eps - output).norm())
            for path in paths:
                heads = unet.get_submodule(path).heads
                q, k_ = (captured[path, name].unflatten(-1, (heads, -1)) for name in ("to_q", "to_k"))
                logits = torch.einsum("lhd,thd->hlt", q, k_) / math.sqrt(q.shape[-1])
                layer_means.append(torch.logsumexp(logits, -1).mean())
        terms.append((torch.stack(layer_means).mean().item(), (errors[0] - errors[1]).item()))
    return terms


@pytest.mark.parametrize(
    ("family", "prediction_type"),
    [("sd15", "epsilon"), ("sd21", "epsilon"), ("sd21", "v_prediction"), ("sdxl", "epsilon")],
)
@torch.no_grad()
def test_score_equals_float64_oracle(family, prediction_type):
    pipe = tiny_pipeline(family, prediction_type=prediction_type)
    image, timesteps, seed = pictures(1)[0], [701, 5], 3
    terms = oracle_terms(family, prediction_type, image, CAPTIONS[1], timesteps, seed)
    attention = sum(a for a, _ in terms) / 2
    gain = sum(b for _, b in terms) / 2
    arguments = {"timesteps": timesteps, "seed": seed}
    # The gain is a difference of two norms of about sqrt(4 · 16 · 16) = 32; each float32 norm of a prediction with a
    # relative error of about 1e-6 is off by 3e-5.
    scores = matching.score(pipe, [image], [CAPTIONS[1]], **arguments)
    assert scores.shape == (1, 1)
    assert scores.dtype == torch.float32
    assert scores.item() == pytest.approx(attention + gain, abs=6e-5)
    assert abs(gain) > 1e-2
    alone = matching.score(pipe, [image], [CAPTIONS[1]], **arguments, noise_weight=0)
    assert alone.item() == pytest.approx(attention, rel=3e-6)
    weighted = matching.score(pipe, [image], [CAPTIONS[1]], **arguments, attention_weight=0.2, noise_weight=0.3)
    assert weighted.item() == pytest.approx(0.4 * attention + 0.3 * gain, abs=6e-5)


@pytest.fixture(scope="module")
def official():
    config = json.loads((DATA / "config.json").read_text())
    unet = diffusers.UNet2DConditionModel.from_config(config).eval()
    unet.load_state_dict(load_file(DATA / "diffusion_pytorch_model.safetensors"))
    return unet, load_file(DATA / "dsd_scores.safetensors")


@pytest.mark.parametrize("t", [1, 261, 801])
@pytest.mark.parametrize("sections", [("down", "mid", "up"), ("down",), ("mid",), ("up",)], ids="-".join)
def test_pair_terms_equal_official_code(official, t, sections):
    unet, numbers = official
    attention, gain = matching.pair_terms(
        unet, numbers["latents"], t, numbers["noise"], numbers["uncond"], numbers["cond"], sections=sections
    )
    name = "all" if len(sections) == 3 else sections[0]
    torch.testing.assert_close(attention, numbers[f"t{t}.{name}.bias0"], rtol=0, atol=1e-4)
    torch.testing.assert_close(attention + gain, numbers[f"t{t}.{name}.bias1"], rtol=0, atol=1e-4)


def test_row_terms_are_the_halves_of_pair_terms(official):
    unet, numbers = official
    pairs = len(numbers["latents"])
    uncond, cond = (numbers[name].expand(pairs, -1, -1) for name in ("uncond", "cond"))
    texts, latents = torch.cat([uncond, cond]), torch.cat([numbers["latents"]] * 2)
    rows, errors = matching.row_terms(unet, latents, 261, numbers["noise"][0], texts, sections=("mid",))
    assert rows.shape == errors.shape == (2 * pairs,)
    arguments = (numbers["latents"], 261, numbers["noise"][0], uncond, cond)
    attention, gain = matching.pair_terms(unet, *arguments, sections=("mid",))
    assert torch.equal((rows[:pairs] + rows[pairs:]) / 2, attention)
    assert torch.equal(errors[:pairs] - errors[pairs:], gain)


def test_official_timesteps():
    def ends(count):
        grid = matching.official_timesteps(count)
        assert grid == sorted(set(grid))
        return len(grid), grid[0], grid[1], grid[-1]

    # METHODS 1a.4, computed there from the official code.
    assert ends(10) == (10, 89, 189, 989)
    assert ends(30) == (30, 32, 65, 989)
    assert ends(40) == (40, 14, 39, 989)
    assert ends(50) == (49, 29, 49, 989)
    assert ends(200) == (196, 14, 19, 989)
    assert ends(1000) == (980, 10, 11, 989)


def test_score_takes_a_count_of_timesteps():
    pipe = tiny_pipeline("sd15")
    by_count = matching.score(pipe, pictures(1), CAPTIONS[:1], timesteps=3)
    by_list = matching.score(pipe, pictures(1), CAPTIONS[:1], timesteps=matching.official_timesteps(3))
    assert torch.equal(by_count, by_list)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_mean", [False, True])
def test_score_costs_what_the_official_code_costs(family, batch_mean):
    pipe = tiny_pipeline(family)
    calls = Counter()

    def count(name, rows):
        def hook(_, args, kwargs):
            calls[name, rows(args, kwargs)] += 1

        return hook

    def rows(args, kwargs):
        return len(args[0] if args else kwargs["sample"])

    encoders = ["text_encoder", "text_encoder_2"] if family == "sdxl" else ["text_encoder"]
    pipe.unet.register_forward_pre_hook(count("unet", rows), with_kwargs=True)
    pipe.vae.encoder.register_forward_pre_hook(count("vae", rows), with_kwargs=True)
    for name in encoders:
        getattr(pipe, name).register_forward_pre_hook(count(name, rows), with_kwargs=True)

    N, M, T = 2, 3, 4
    matching.score(pipe, pictures(N), CAPTIONS, timesteps=T, batch_mean=batch_mean)
    if batch_mean:
        expected = {("unet", 2 * N): M * T, ("vae", N): M * T, **{(name, 2): M for name in encoders}}
    else:
        expected = {("unet", 2): N * M * T, ("vae", 1): N * M * T, **{(name, 2): N * M for name in encoders}}
    assert calls == expected

    calls.clear()
    matching.score(pipe, [], CAPTIONS[:1], timesteps=T, latents=torch.randn(N, 4, 16, 16))
    assert calls == {("unet", 2): N * T, **{(name, 2): N for name in encoders}}


@pytest.mark.alone
def test_score_spends_its_time_in_the_modules(monkeypatch):
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
        matching.score(pipe, images, CAPTIONS[:1], timesteps=10)
        return 1 - inside / (time.process_time() - start)

    images = pictures(1)
    share_outside()
    # Processor time of this process: what neighbours do costs nothing, and the smallest of three leaves out the rest.
    assert min(share_outside() for _ in range(3)) < 0.10


def test_score_leaves_the_pipeline_as_it_was():
    pipe = tiny_pipeline("sd15")
    before = dict(pipe.unet.attn_processors)
    matching.score(pipe, pictures(1), CAPTIONS[:1], timesteps=[500])
    after = pipe.unet.attn_processors
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)

    def fail(*_):
        count = [type(p) for p in pipe.unet.attn_processors.values()].count(matching._RecordingProcessor)
        raise RuntimeError(f"{count} layers record")

    pipe.unet.up_blocks[3].attentions[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="6 layers record"):
        matching.score(pipe, pictures(1), CAPTIONS[:1], timesteps=[500])
    assert all(pipe.unet.attn_processors[name] is before[name] for name in before)


def test_recording_changes_no_prediction():
    pipe = tiny_pipeline("sd21")
    arguments = (torch.randn(2, 4, 16, 16), 321, torch.randn(2, 77, 32))
    with torch.no_grad():
        plain = pipe.unet(*arguments).sample
        layers = matching._score_layers(pipe.unet, matching.SECTIONS)
        with recording(layers, matching._RecordingProcessor) as lse:
            recorded = pipe.unet(*arguments).sample
    assert [len(rows) for rows in lse] == [2] * 6
    torch.testing.assert_close(recorded, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_batch_mean_shares_the_attention_part(family):
    pipe, images = tiny_pipeline(family), pictures(3)
    attention = matching.score(pipe, images, CAPTIONS, timesteps=2, noise_weight=0)
    shared = matching.score(pipe, images, CAPTIONS, timesteps=2, noise_weight=0, batch_mean=True)
    torch.testing.assert_close(shared, attention.mean(0, keepdim=True).expand(3, -1), rtol=1e-5, atol=0)
    assert attention.std(0).min() > 1e-4
    # The noise-prediction part stays each pair's own. Its rounding is that of norms of about 32.
    gain = matching.score(pipe, images, CAPTIONS, timesteps=2, attention_weight=0)
    both = matching.score(pipe, images, CAPTIONS, timesteps=2, batch_mean=True)
    torch.testing.assert_close(both, shared + gain, rtol=0, atol=1e-4)


def test_a_pair_does_not_depend_on_its_batch():
    pipe, images = tiny_pipeline("sd15"), pictures(3)
    scores = matching.score(pipe, images, CAPTIONS, timesteps=2)
    alone = matching.score(pipe, images[2:], CAPTIONS[1:2], timesteps=2)
    assert alone.item() == scores[2, 1].item()
    shared = matching.score(pipe, images, CAPTIONS, timesteps=2, batch_mean=True)
    alone = matching.score(pipe, images[2:], CAPTIONS[1:2], timesteps=2, batch_mean=True)
    assert abs(alone.item() - shared[2, 1].item()) > 1e-3


def test_noise_and_latents_replace_what_is_drawn_and_encoded():
    pipe, images = tiny_pipeline("sd15"), pictures(2)
    drawn = matching.score(pipe, images, CAPTIONS, timesteps=2, seed=7)
    noise = torch.stack([noise_like(7, k, (4, 16, 16)) for k in range(2)])
    assert torch.equal(matching.score(pipe, images, CAPTIONS, timesteps=2, noise=noise), drawn)
    assert not torch.equal(matching.score(pipe, images, CAPTIONS, timesteps=2, noise=noise.flip(0)), drawn)

    pixels = torch.stack(
        [
            torch.from_numpy(np.array(image.resize((64, 64), Image.Resampling.BICUBIC))).permute(2, 0, 1)
            for image in images
        ]
    )
    with torch.no_grad():
        latents = pipe.vae.encode(2 * (pixels / 255) - 1).latent_dist.mode() * 0.18215
    given = matching.score(pipe, [], CAPTIONS, timesteps=2, seed=7, latents=latents)
    torch.testing.assert_close(given, drawn, rtol=0, atol=1e-4)


def test_kinds_of_images():
    pipe = tiny_pipeline("sd15")
    side = 16 * pipe.vae_scale_factor
    image = pictures(1)[0]
    array = np.array(image)
    small = np.array(image.resize((side, side), Image.Resampling.BICUBIC))
    expected = inputs.preprocess(pipe, [image])
    assert expected.shape == (1, 3, side, side)
    assert torch.equal(inputs.preprocess(pipe, [array]), expected)
    assert torch.equal(expected[0], 2 * (torch.from_numpy(small).permute(2, 0, 1) / 255) - 1)
    assert torch.equal(inputs.preprocess(pipe, [torch.from_numpy(array).permute(2, 0, 1) / 255]), expected)
    grey = image.convert("L")
    assert torch.equal(inputs.preprocess(pipe, [grey]), inputs.preprocess(pipe, [grey.convert("RGB")]))


def test_half_precision_vae_is_upcast_where_its_config_asks():
    pipe = tiny_pipeline("sdxl").to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    dtypes = []
    pipe.vae.encoder.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    scores = matching.score(pipe, pictures(1), CAPTIONS[:1], timesteps=[500])
    assert dtypes == [torch.float32]
    assert pipe.vae.dtype == torch.float16
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": 0}, "timesteps: got 0, expected a count from 1 to 1000"),
        ({"timesteps": [500, 1000]}, r"timesteps: got \[500, 1000\], expected at least one, each from 0 to 999"),
        ({"timesteps": []}, r"timesteps: got \[\]"),
        ({"captions": ["dog " * 80]}, "captions: 'dog .*' has 82 tokens, expected at most 77"),
        ({"images": []}, "images: got none"),
        ({"noise": torch.zeros(1, 4, 8, 8)}, r"noise: got shape \(1, 4, 8, 8\), expected \(2, 4, 16, 16\)"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    arguments = {"images": pictures(1), "captions": CAPTIONS[:1], "timesteps": [10, 20], **change}
    with pytest.raises(ValueError, match=message):
        matching.score(tiny_pipeline("sd15"), **arguments)


def test_pipelines_that_do_not_fit():
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        matching.score(tiny_pipeline("sd15", prediction_type="sample"), pictures(1), CAPTIONS)
    pipe = tiny_pipeline("sd15")
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.CustomDiffusionAttnProcessor(False, False))
    with pytest.raises(ValueError, match="attention processor CustomDiffusionAttnProcessor"):
        matching.score(pipe, pictures(1), CAPTIONS)


def test_signature_is_the_contract():
    parameters = inspect.signature(matching.score).parameters
    assert list(parameters)[:3] == ["pipe", "images", "captions"]
    assert {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == {
        "timesteps": 10,
        "attention_weight": 0.5,
        "noise_weight": 1.0,
        "seed": 0,
        "latents": None,
        "noise": None,
        "batch_mean": False,
    }


def test_learned_tokens_of_several_vectors_are_spelled_out():
    pipe = tiny_pipeline("sd15")
    pipe.load_textual_inversion({"<bird>": torch.randn(2, 24)})
    scores = matching.score(pipe, pictures(1), ["a <bird>", "a <bird> <bird>_1"], timesteps=[500])
    # The second spells it out by hand, after which the first vector is followed by both.
    ids = inputs.tokenize(pipe, pipe.tokenizer, "a <bird>")[1]
    assert ids.tolist()[2:4] == pipe.tokenizer.convert_tokens_to_ids(["<bird>", "<bird>_1"])
    assert scores[0, 0] != scores[0, 1]
