import hashlib

import diffusers
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.models import ModelError
from tests.tiny import CROSS_ATTENTION_DIM, FAMILIES, POOLED_DIM, tiny_pipeline, tiny_vae

PROMPTS = ["a red cat", "", "a small blue circle left of a dog, 3 ears!", "été ☂ naïve"]


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture(scope="module")
def model(pipe):
    return dsd.from_pipeline(pipe)


def stock_states(pipe, prompts):
    if hasattr(pipe, "tokenizer_2"):
        out = pipe.encode_prompt(list(prompts), device="cpu", do_classifier_free_guidance=False)
        return out[0], out[2]
    return pipe.encode_prompt(list(prompts), "cpu", 1, False)[0], None


def pixels(pipe, rows=2, seed=0):
    side = pipe.vae.config.sample_size
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
@pytest.mark.newest
def test_encode_prompts_is_the_stock_pipelines(pipe, model):
    ours = model.encode_prompts(PROMPTS)
    states, pooled = stock_states(pipe, PROMPTS)
    assert torch.equal(ours.states, states)
    assert (ours.pooled is None) == (pooled is None)
    assert pooled is None or torch.equal(ours.pooled, pooled)
    assert len(ours) == len(PROMPTS)
    expected = pipe.tokenizer(PROMPTS)["input_ids"]
    assert ours.lengths.tolist() == [len(ids) for ids in expected]
    assert ours.lengths.dtype == ours.token_ids.dtype == torch.int64
    for ids, row in zip(expected, ours.token_ids, strict=True):
        assert row[: len(ids)].tolist() == ids
        assert set(row[len(ids) :].tolist()) <= {pipe.tokenizer.pad_token_id}


@torch.no_grad()
def test_encode_unconditional_is_the_stock_pipelines(pipe, model):
    ours = model.encode_unconditional()
    if model.family == "sdxl":
        _, states, _, pooled = pipe.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
        assert torch.equal(ours.pooled, pooled)
        assert not states.any()
    else:
        states = pipe.encode_prompt("a cat", "cpu", 1, True)[1]
        assert ours.pooled is None
    assert torch.equal(ours.states, states)
    assert ours.lengths.tolist() == [2]


@torch.no_grad()
def test_encode_unconditional_without_zeros():
    pipe = tiny_pipeline("sdxl")
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    ours = dsd.from_pipeline(pipe).encode_unconditional()
    _, states, _, pooled = pipe.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
    assert torch.equal(ours.states, states)
    assert torch.equal(ours.pooled, pooled)


def test_encode_prompts_shapes(pipe, model):
    family = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}[model.family]
    ours = model.encode_prompts(PROMPTS)
    assert ours.states.shape == (len(PROMPTS), 77, CROSS_ATTENTION_DIM[family])
    assert ours.token_ids.shape == (len(PROMPTS), 77)
    if family == "sdxl":
        assert ours.pooled.shape == (len(PROMPTS), POOLED_DIM)
    empty = model.encode_prompts([])
    assert empty.states.shape == (0, 77, CROSS_ATTENTION_DIM[family])
    assert empty.lengths.shape == (0,)
    assert empty.token_ids.shape == (0, 77)


@torch.no_grad()
def test_encode_prompts_in_chunks(model, monkeypatch):
    whole = model.encode_prompts(PROMPTS)
    monkeypatch.setattr("dsd_fast.models.prompts._PROMPTS_AT_ONCE", 3)
    parts = model.encode_prompts(PROMPTS)
    # Matrix products may sum in another order for another number of rows.
    torch.testing.assert_close(parts.states, whole.states, rtol=0, atol=1e-5)
    if whole.pooled is not None:
        torch.testing.assert_close(parts.pooled, whole.pooled, rtol=0, atol=1e-5)
    assert torch.equal(parts.lengths, whole.lengths)


@torch.no_grad()
def test_encode_prompts_honours_the_attention_mask_setting():
    pipe = tiny_pipeline("sd15")
    without = dsd.from_pipeline(pipe).encode_prompts(PROMPTS).states
    pipe.text_encoder.config.use_attention_mask = True
    ours = dsd.from_pipeline(pipe).encode_prompts(PROMPTS).states
    assert torch.equal(ours, stock_states(pipe, PROMPTS)[0])
    assert not torch.equal(ours, without)


@torch.no_grad()
def test_encode_prompts_with_learned_tokens_of_several_vectors(tmp_path):
    from safetensors.torch import save_file

    pipe = tiny_pipeline("sd15")
    save_file({"<cat-toy>": torch.randn(3, CROSS_ATTENTION_DIM["sd15"])}, tmp_path / "learned_embeds.safetensors")
    pipe.load_textual_inversion(tmp_path, use_safetensors=True, weight_name="learned_embeds.safetensors")
    prompt = "a photo of <cat-toy>"
    ours = dsd.from_pipeline(pipe).encode_prompts([prompt])
    assert torch.equal(ours.states, stock_states(pipe, [prompt])[0])
    plain = dsd.from_pipeline(pipe).encode_prompts(["a photo of"]).lengths
    assert (ours.lengths - plain).tolist() == [3]


def test_encode_prompts_refuses(model):
    fits, longer = "a " * 75, "a " * 76
    assert model.encode_prompts([fits]).lengths.tolist() == [77]
    with pytest.raises(ValueError, match=r"prompts\[1\] has 78 tokens, expected at most 77, start and end tokens"):
        model.encode_prompts(["a", longer])
    with pytest.raises(ValueError, match="prompts is a str, expected a sequence of str"):
        model.encode_prompts("a cat")
    with pytest.raises(ValueError, match=r"prompts\[1\] has half of a surrogate pair, which is no text"):
        model.encode_prompts(["a", "b \ud83d"])
    with pytest.raises(ValueError, match=r"prompts\[1\] is of type NoneType, expected str"):
        model.encode_prompts(["a", None])


def test_encode_prompts_passes_gradients():
    model = dsd.from_pipeline(tiny_pipeline("sd15"))
    model.encode_prompts(["a cat"]).states.sum().backward()
    assert model.text_encoders[0].get_input_embeddings().weight.grad.abs().sum() > 0


@torch.no_grad()
def test_encode_images_is_the_vae_mean(pipe, model):
    x = pixels(pipe)
    expected = pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor
    assert torch.equal(model.encode_images(x), expected)
    assert expected.shape[2] * model.vae_scale_factor == x.shape[2]
    sampled = model.encode_images(x, sample=True, generator=torch.Generator().manual_seed(3))
    stock = pipe.vae.encode(x).latent_dist.sample(torch.Generator().manual_seed(3)) * pipe.vae.config.scaling_factor
    assert torch.equal(sampled, stock)
    assert not torch.equal(sampled, expected)


@torch.no_grad()
def test_encode_images_takes_any_type(pipe, model):
    x = pixels(pipe).to(torch.bfloat16)
    assert torch.equal(model.encode_images(x), model.encode_images(x.float()))


@torch.no_grad()
def test_decode_latents_is_the_stock_decoding(pipe, model):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    result = model.decode_latents(latents)
    assert torch.equal(result, expected)
    assert result.shape == (2, 3, *model.image_size)


@pytest.mark.parametrize(
    ("config", "shift", "scale"),
    [
        ({"shift_factor": 0.25}, [0.25] * 4, [0.18215] * 4),
        (
            {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 4.0, 8.0]},
            [0.1, 0.2, 0.3, 0.4],
            [0.18215 / s for s in (1, 2, 4, 8)],
        ),
    ],
)
@torch.no_grad()
def test_latents_are_shifted(config, shift, scale):
    pipe = tiny_pipeline("sd15")
    plain = dsd.from_pipeline(pipe)
    x = pixels(pipe)
    mean = pipe.vae.encode(x).latent_dist.mean
    decoded = plain.decode_latents(plain.encode_images(x))
    pipe.vae.register_to_config(**config)
    model = dsd.from_pipeline(pipe)
    shift, scale = (torch.tensor(v).view(1, 4, 1, 1) for v in (shift, scale))
    torch.testing.assert_close(model.encode_images(x), (mean - shift) * scale)
    # The decoder sees the mean again, up to the rounding of the way there and back.
    torch.testing.assert_close(model.decode_latents(model.encode_images(x)), decoded, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shift_factor": 0.3},
        {"latents_mean": [0.1, -0.7, 0.3, 0.4], "latents_std": [1.1, 2.3, 0.7, 5.3]},
    ],
    ids=lambda config: next(iter(config), "scale"),
)
@torch.no_grad()
def test_latents_of_16_bits_are_rounded_once(config, dtype):
    pipe = tiny_pipeline("sd15")
    pipe.to(dtype)
    pipe.vae.register_to_config(**config)
    model = dsd.from_pipeline(pipe)
    x = pixels(pipe).to(dtype)
    shift, std = (
        torch.tensor(config.get(name) or default, dtype=torch.float64).view(1, -1, 1, 1)
        for name, default in (("latents_mean", [config.get("shift_factor", 0.0)]), ("latents_std", [1.0]))
    )
    mean = pipe.vae.encode(x).latent_dist.mean.double()
    found = model.encode_images(x)
    # The nearest number of the type, but for what float32 cannot tell to be nearer.
    half_a_place = torch.finfo(dtype).eps / 2 * (1 + 1e-3)
    torch.testing.assert_close(found.double(), (mean - shift) * 0.18215 / std, rtol=half_a_place, atol=1e-6)
    latents = found.double() / 0.18215 * std + shift
    assert torch.equal(model.decode_latents(found), pipe.vae.decode(latents.to(dtype)).sample.clamp(-1, 1))


@torch.no_grad()
def test_sdxl_vae_runs_in_float32_where_float16_overflows():
    pipe = tiny_pipeline("sdxl")
    # Activations above 65504, as the published SDXL VAE has them.
    pipe.vae.encoder.conv_in.weight *= 1e5
    x = pixels(pipe)
    half = tiny_pipeline("sdxl")
    half.vae = pipe.vae
    half.to(torch.float16)
    assert not half.vae.encode(x.half()).latent_dist.mean.isfinite().all()
    model = dsd.from_pipeline(half)
    expected = tiny_vae("sdxl", seed=1)
    expected.load_state_dict(half.vae.state_dict())
    latents = model.encode_images(x)
    assert latents.dtype == torch.float16
    assert half.vae.dtype == torch.float16
    assert torch.equal(latents, (expected.encode(x).latent_dist.mean * 0.13025).half())
    half.vae.register_to_config(force_upcast=False)
    assert not dsd.from_pipeline(half).encode_images(x).isfinite().all()


def test_encode_images_refuses(model):
    f = model.vae_scale_factor
    for shape in [(3, 4 * f, 4 * f), (1, 4, 4 * f, 4 * f), (1, 3, 4 * f + 1, 4 * f)]:
        with pytest.raises(ValueError, match=rf"pixels has shape .*expected \(N, 3, H, W\) .* multiples of {f}"):
            model.encode_images(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"pixels has dtype torch.uint8, expected floating point in \[-1, 1\]"):
        model.encode_images(torch.zeros(1, 3, 4 * f, 4 * f, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"latents has shape \(1, 3, 2, 2\), expected \(N, 4, h, w\)"):
        model.decode_latents(torch.zeros(1, 3, 2, 2))


def test_attributes(pipe, model):
    sdxl = model.family == "sdxl"
    assert model.family == {"pixel64": "sd1", "pixel128": "sd2", "pixel32": "sdxl"}[f"pixel{model.image_size[0]}"]
    assert model.image_size == (16 * model.vae_scale_factor,) * 2
    assert model.vae_scale_factor == pipe.vae_scale_factor
    assert len(model.text_encoders) == len(model.tokenizers) == (2 if sdxl else 1)
    assert model.unet is pipe.unet
    assert model.vae is pipe.vae
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.clip is None
    assert model.revision is None
    assert model.name == type(pipe).__name__
    assert model.scheduler_config["_class_name"] == type(pipe.scheduler).__name__
    torch.testing.assert_close(
        model.schedule.alphas_cumprod, pipe.scheduler.alphas_cumprod.double(), rtol=3e3 * 1.2e-7, atol=0
    )


def test_v_prediction():
    model = dsd.from_pipeline(tiny_pipeline("sd21", prediction_type="v_prediction"))
    assert model.schedule.prediction_type == "v_prediction"


def test_time_ids(pipe, model):
    ids = model.time_ids(64, 96)
    if model.family == "sdxl":
        stock = pipe._get_add_time_ids((64, 96), (0, 0), (64, 96), torch.float32, POOLED_DIM)
        assert torch.equal(ids, stock[0])
    else:
        assert ids is None


def test_to_pipeline_shares_the_weights(pipe, model):
    other = model.to_pipeline()
    assert type(other) is type(pipe)
    for name in ("unet", "vae", "text_encoder", "tokenizer", *(("text_encoder_2",) if model.family == "sdxl" else ())):
        assert getattr(other, name) is getattr(pipe, name)
    assert other.scheduler is not pipe.scheduler
    assert dict(other.scheduler.config) == dict(pipe.scheduler.config)
    options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 2.0}
    other.set_progress_bar_config(disable=True)
    images = [p("a red cat", generator=torch.Generator().manual_seed(1), **options).images for p in (pipe, other)]
    assert torch.equal(*images)


def test_to_pipeline_keeps_the_rule_for_empty_prompts():
    pipe = tiny_pipeline("sdxl")
    assert dsd.from_pipeline(pipe).to_pipeline().config.force_zeros_for_empty_prompt is True
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert dsd.from_pipeline(pipe).to_pipeline().config.force_zeros_for_empty_prompt is False


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.newest
def test_round_trip_through_a_folder(family, tmp_path):
    first = dsd.from_pipeline(tiny_pipeline(family))
    first.to_pipeline().save_pretrained(tmp_path)
    second = dsd.load(tmp_path)
    third = dsd.from_pipeline(diffusers.DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True))
    x = pixels(first)
    for other in (second, third):
        assert torch.equal(other.encode_prompts(PROMPTS).states, first.encode_prompts(PROMPTS).states)
        # The same weights at another address may be multiplied in another order.
        torch.testing.assert_close(other.encode_images(x), first.encode_images(x), rtol=0, atol=1e-5)
        assert torch.equal(other.schedule.alphas_cumprod, first.schedule.alphas_cumprod)
        assert other.family == first.family


def fingerprint(pipe):
    """Everything of a pipeline that a guest could change: weights, flags, hooks, processors, configs, components."""
    digest = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            for key, value in module.state_dict().items():
                digest.update(f"{name}.{key} {value.dtype} {value.device}".encode() + value.numpy().tobytes())
            for key, parameter in module.named_parameters():
                digest.update(f"{name}.{key} {id(parameter)} {parameter.requires_grad}".encode())
            for key, child in module.named_modules():
                hooks = (
                    len(child._forward_hooks),
                    len(child._forward_pre_hooks),
                    child.training,
                    id(child.forward.__func__),
                )
                digest.update(f"{name}.{key} {hooks}".encode())
        digest.update(f"{name} {id(module)} {getattr(module, 'config', None)}".encode())
    digest.update(str(pipe.config).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.newest
def test_from_pipeline_changes_nothing(family):
    pipe = tiny_pipeline(family)
    pipe.unet.train()
    pipe.vae.requires_grad_(False)
    pipe.scheduler.set_timesteps(7)
    processors = {key: id(value) for key, value in pipe.unet.attn_processors.items()}
    # transformers puts its own hooks into an encoder the first time hidden states are asked for.
    stock_states(pipe, PROMPTS)
    before = fingerprint(pipe)
    model = dsd.from_pipeline(pipe)
    model.encode_images(pixels(pipe))
    model.encode_prompts(PROMPTS)
    model.decode_latents(torch.zeros(1, 4, 16, 16))
    model.to_pipeline()
    assert fingerprint(pipe) == before
    assert {key: id(value) for key, value in pipe.unet.attn_processors.items()} == processors
    assert pipe.scheduler.num_inference_steps == 7


def test_scheduler_config_is_a_copy():
    pipe = tiny_pipeline("sd15")
    pipe.scheduler = diffusers.DDIMScheduler(trained_betas=[0.1] * 30)
    model = dsd.from_pipeline(pipe)
    assert model.schedule.num_train_timesteps == 30
    model.scheduler_config["prediction_type"] = "sample"
    model.scheduler_config["trained_betas"][0] = 0.5
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.scheduler.config.trained_betas == [0.1] * 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "in_channels = 9 .an inpainting UNet., expected the VAE's 4"),
        ({"in_channels": 8}, "in_channels = 8 .an image-editing UNet., expected the VAE's 4"),
        ({"out_channels": 8}, "out_channels = 8, expected 4"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep', expected none as in SD 1.x"),
        ({"addition_embed_type": "text"}, "addition_embed_type = 'text', expected none .* or 'text_time'"),
        ({"addition_embed_type": "text_time"}, "1 text encoders, expected 2 for this UNet"),
        ({"cross_attention_dim": 99}, "cross_attention_dim = 99, expected 24, the width of the text states"),
        ({"cross_attention_dim": (24, 24, 48)}, "cross_attention_dim = .24, 24, 48., expected 24"),
    ],
)
def test_from_pipeline_refuses_other_unets(change, message):
    pipe = tiny_pipeline("sd15")
    pipe.unet.register_to_config(**change)
    with pytest.raises(ModelError, match=message):
        dsd.from_pipeline(pipe)


def test_from_pipeline_refuses_other_pooled_states():
    pipe = tiny_pipeline("sdxl")
    pipe.unet.register_to_config(projection_class_embeddings_input_dim=5 * 8 + POOLED_DIM)
    with pytest.raises(ModelError, match="projection_class_embeddings_input_dim = 60, expected 68 for 6 time ids"):
        dsd.from_pipeline(pipe)


def test_from_pipeline_refuses_other_objects():
    with pytest.raises(ModelError, match="pipe is of type str, expected a diffusers pipeline"):
        dsd.from_pipeline("mini")
    pipe = tiny_pipeline("sd15")
    pipe.vae = None
    with pytest.raises(ModelError, match="StableDiffusionPipeline has no component 'vae'"):
        dsd.from_pipeline(pipe)
    pipe = tiny_pipeline("sd15")
    pipe.vae = diffusers.AutoencoderTiny()
    with pytest.raises(ModelError, match="'vae' is a AutoencoderTiny, expected AutoencoderKL"):
        dsd.from_pipeline(pipe)
    pipe = tiny_pipeline("sd15")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ModelError, match="scheduler is a FlowMatchEulerDiscreteScheduler, expected one of"):
        dsd.from_pipeline(pipe)
    refiner = tiny_pipeline("sdxl")
    refiner.text_encoder = None
    with pytest.raises(ModelError, match="StableDiffusionXLPipeline has no component 'text_encoder'"):
        dsd.from_pipeline(refiner)
