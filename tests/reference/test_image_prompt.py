"""The official conversion of images to prompts against its formulas, written again in float64, and its costs."""

from collections import Counter

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from dsd_fast.reference import image_prompt
from tests.tiny import tiny_clip, tiny_pipeline

PROMPTS = ["a cat", "", "a red dog are cat dog"]
# The tiny CLIP's singular values are 0.16 to 1.6.
RECIPE = {"cut": 0.6, "norm": 5.0}


@pytest.fixture(scope="module")
def pipe():
    made = tiny_pipeline("sd15")
    for part in (made.unet, made.vae, made.text_encoder):
        part.to(torch.float64).requires_grad_(False)
    return made


@pytest.fixture(scope="module")
def clip():
    return tiny_clip().double()


def pictures(count=3):
    sizes = [(40, 61), (90, 33), (32, 32)]
    draw = np.random.default_rng(3).integers
    return [Image.fromarray(draw(0, 255, (*sizes[number], 3), dtype=np.uint8)) for number in range(count)]


def prepared(image):
    """What transformers' processor does, step by step: its shorter side to 32, the middle, OpenAI's statistics."""
    scale = 32 / min(image.size)
    image = image.resize(tuple(int(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = ((side - 32) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + 32, top + 32)), dtype=np.float64) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


@torch.no_grad()
def by_svd(clip, image):
    """h of an image, (E,), by an explicit decomposition."""
    u, s, vt = torch.linalg.svd(clip.text_projection.weight, full_matrices=False)
    kept = s > RECIPE["cut"]
    assert 0 < kept.sum() < len(s)
    embedding = clip.get_image_features(prepared(image))
    embedding = getattr(embedding, "pooler_output", embedding)[0]
    h = vt[kept].T @ ((u[:, kept].T @ embedding) / s[kept])
    return RECIPE["norm"] * h / h.norm()


def test_vectors_are_those_of_an_explicit_decomposition(pipe, clip):
    states = image_prompt.convert(pipe, clip, pictures(), **RECIPE)
    for row, image in zip(states, pictures(), strict=True):
        # Pixels are the processor's, of float32.
        torch.testing.assert_close(row[5], by_svd(clip, image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.6, 0.0])
def test_states_stand_where_they_should(pipe, clip, alpha):
    images, vectors = pictures(), [by_svd(clip, image) for image in pictures()]
    texts = torch.cat([pipe.encode_prompt(text, "cpu", 1, False)[0] for text in PROMPTS])
    edited = image_prompt.edit(pipe, clip, images, PROMPTS, alpha, **RECIPE)
    plain = image_prompt.convert(pipe, clip, images, **RECIPE)
    for row, (text, h) in enumerate(zip(texts, vectors, strict=True)):
        words = len(pipe.tokenizer.tokenize(PROMPTS[row]))
        for place in range(77):
            wanted = h + alpha * text[place] if place > words else text[place]
            torch.testing.assert_close(edited[row, place], wanted, rtol=0, atol=1e-5)
            torch.testing.assert_close(plain[row, place], h if place else text[0], rtol=0, atol=1e-5)


def test_an_image_costs_what_the_official_code_costs(pipe, clip):
    calls = Counter()

    def count(name):
        return lambda _, args, kwargs: calls.update({(name, len(args[0] if args else kwargs["pixel_values"])): 1})

    hooks = [
        pipe.text_encoder.register_forward_pre_hook(count("text"), with_kwargs=True),
        clip.vision_model.register_forward_pre_hook(count("vision"), with_kwargs=True),
    ]
    image_prompt.convert(pipe, clip, pictures(), **RECIPE)
    for hook in hooks:
        hook.remove()
    assert calls == {("text", 1): 1, ("vision", 1): 3}


@pytest.mark.parametrize("official", [True, False])
def test_deep_prompts_are_put_before_each_layer(clip, official):
    vision, length = image_prompt.DeepPrompts(clip, 3, official=official).eval(), 3
    bound = (6 / (3 * 16 + 24)) ** 0.5
    assert vision.deep_prompt_embeddings.shape == (2, length, 24)
    assert 0.8 * bound < vision.deep_prompt_embeddings.abs().max() <= bound
    with torch.no_grad():
        vision.prompt_norm.weight.normal_(generator=torch.Generator().manual_seed(0))
    lengths, stock = [], clip.vision_model

    def put(place, layer):
        def before(_, args):
            states = args[0]
            own = functional.linear(
                vision.deep_prompt_embeddings[place], vision.prompt_proj.weight, vision.prompt_proj.bias
            )
            rest = states[:, 1:] if place == 0 and not official else states[:, 1 + length :]
            lengths.append(1 + length + rest.shape[1])
            return (torch.cat([states[:, :1], own.expand(len(states), -1, -1), rest], 1), *args[1:])

        return layer.register_forward_pre_hook(before)

    hooks = [put(*each) for each in enumerate(stock.encoder.layers)]
    hooks.append(stock.post_layernorm.register_forward_pre_hook(lambda _, args: (vision.prompt_norm(args[0]),)))
    pixels = torch.cat([prepared(image) for image in pictures()])
    wanted = stock(pixel_values=pixels).pooler_output
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(vision(pixel_values=pixels).pooler_output, wanted, rtol=0, atol=1e-12)
    assert lengths == [17 if official else 20] * 2
    # Nothing of it stays in the encoder.
    assert (stock(pixel_values=pixels).pooler_output - wanted).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_tuning_is_adamw_on_the_noise_loss(clip, kind):
    pipe = tiny_pipeline("sd15", prediction_type=kind)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(torch.float64).requires_grad_(False)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.requires_grad_(True)
    before = layer.weight.detach().clone()
    # A single step by its definition: AdamW's first one is the rate, away from the gradient's sign.
    options = {"batch": 2, "length": 2, "dropout": 0.0, "weight_decay": 0.0, "seed": 5, **RECIPE}
    vision, losses = image_prompt.finetune(pipe, clip, pictures(), steps=2, learning_rate=1e-3, **options)
    moved = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.copy_(before)
    first, _ = image_prompt.finetune(pipe, clip, pictures(), steps=0, learning_rate=1e-3, **options)
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    begin = pipe.text_encoder(pipe.tokenizer("", return_tensors="pt").input_ids)[0][:, 0]
    for step in range(2):
        rows, times, noise = image_prompt.draws(5, step, 2, 3, (4, 16, 16))
        chosen = [pictures()[row] for row in rows]
        pixels = torch.cat([prepared(image) for image in chosen]).float().double()
        h = first(pixel_values=pixels).pooler_output @ clip.visual_projection.weight.T
        h = h @ torch.linalg.pinv(clip.text_projection.weight, atol=RECIPE["cut"]).T
        h = RECIPE["norm"] * functional.normalize(h, dim=1)
        states = torch.stack([begin.expand(2, -1), *[h] * 76], 1)
        with torch.no_grad():
            sized = [np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)) for image in chosen]
            shown = torch.from_numpy(np.stack(sized)).permute(0, 3, 1, 2).double() / 127.5 - 1
            latents = pipe.vae.encode(shown).latent_dist.mode() * pipe.vae.config.scaling_factor
        noise = noise.double()
        predicted = pipe.unet(scheduler.add_noise(latents, noise, times), times, states).sample
        wanted = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, times)
        loss = functional.mse_loss(predicted, wanted)
        # Latents are the VAE's of float32 pixels, and diffusers rounds square roots of ᾱ in another order.
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        if step:
            break
        trained = [*first.parameters(), layer.weight]
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= 1e-3 * gradient / (gradient.abs() + 1e-8)
    assert (moved - before).abs().max() > 1e-4
    assert losses[0] != losses[1]
    assert not vision.training
    assert all(each.grad is None for each in (*clip.parameters(), *pipe.vae.parameters()))


def test_a_prompt_that_is_too_long(pipe, clip):
    with pytest.raises(ValueError, match=r"captions: 'dog .*' has 82 tokens, expected at most 77"):
        image_prompt.edit(pipe, clip, pictures(1), "dog " * 80, **RECIPE)
