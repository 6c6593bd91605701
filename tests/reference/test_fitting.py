"""The official adaptation against a second computation of its formulas, float64 and with PyTorch's own gradient."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from dsd_fast.reference import fitting
from tests.reference.test_matching import SD_LAYERS, SDXL_LAYERS, pictures
from tests.tiny import tiny_pipeline

TEXTS = ["a red dog", "two cats on a blue mat", "a dog"]
TIMESTEPS = [701, 5, 320]
SIDE = 8
# So large that the margin is never kept, and the loss has a gradient.
MARGIN = 10.0


def adapted(family, prediction_type="epsilon", dtype=torch.float64, seed=0):
    """A pipeline with the official adapter, neither of whose factors is zero: a zero one hides the other's gradient."""
    pipe = tiny_pipeline(family, prediction_type=prediction_type)
    pipe.to(dtype)
    pipe.unet.register_to_config(sample_size=SIDE)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(pipe).values():
        values = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1])
        parameter.data.copy_(0.3 * values)
    return pipe


def trainable(pipe):
    return {name: parameter for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad}


def gradients(pipe, loss):
    pipe.unet.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(pipe).items()}


def eps(count, seed=0):
    return torch.randn(count, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def oracle_terms(pipe, family, prediction_type, images, texts, timesteps, noise):
    """(a, b) of each candidate: every UNet row alone, its attention scores from the hooked q and k."""
    unet = pipe.unet
    captured, handles = {}, []
    paths = SDXL_LAYERS if family == "sdxl" else SD_LAYERS
    for path in paths:
        for name in ("to_q", "to_k"):

            def hook(_, __, output, key=(path, name)):
                captured[key] = output[0]

            handles.append(unet.get_submodule(path).get_submodule(name).register_forward_hook(hook))
    side = SIDE * pipe.vae_scale_factor
    scores = []
    for k, t in enumerate(timesteps):
        image = images[k] if len(images) > 1 else images[0]
        resized = torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BICUBIC)))
        pixels = (2 * (resized.float() / 255) - 1).permute(2, 0, 1)[None].double()
        with torch.no_grad():
            clean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
            encoded = pipe.encode_prompt(
                prompt=texts[k] if len(texts) > 1 else texts[0],
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
        states, pooled = (encoded[1], encoded[0]), encoded[3:1:-1]
        alpha = pipe.scheduler.alphas_cumprod[t].double()
        noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise[k].double()
        layer_means, errors = [], []
        for row in range(2):
            added = None
            if family == "sdxl":
                ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float64)
                added = {"text_embeds": pooled[row], "time_ids": ids}
            output = unet(noised, t, states[row], added_cond_kwargs=added).sample
            if prediction_type == "v_prediction":
                output = alpha.sqrt() * output + (1 - alpha).sqrt() * noised
            errors.append((noise[k].double() - output).square().sum().sqrt())
            for path in paths:
                heads = unet.get_submodule(path).heads
                q, k_ = (captured[path, name].unflatten(-1, (heads, -1)) for name in ("to_q", "to_k"))
                logits = torch.einsum("lhd,thd->hlt", q, k_) / math.sqrt(q.shape[-1])
                layer_means.append(logits.exp().sum(-1).log().mean())
        scores.append((torch.stack(layer_means).mean(), errors[0] - errors[1]))
    for handle in handles:
        handle.remove()
    return scores


@pytest.mark.parametrize(
    ("family", "prediction_type", "several", "label", "weights"),
    [
        ("sd15", "epsilon", "texts", 0, (0.5, 1.0)),
        ("sd21", "epsilon", "images", 1, (0.5, 1.0)),
        ("sd21", "v_prediction", "texts", 2, (0.3, 0.1)),
        ("sdxl", "epsilon", "images", 0, (0.3, 0.1)),
    ],
)
def test_loss_and_gradient_equal_oracle(family, prediction_type, several, label, weights):
    pipe = adapted(family, prediction_type)
    images, texts = (pictures(3), TEXTS[1:2]) if several == "images" else (pictures(1), TEXTS)
    noise = eps(3)
    terms = oracle_terms(pipe, family, prediction_type, images, texts, TIMESTEPS, noise)
    scores = [2 * weights[0] * a + weights[1] * b for a, b in terms]
    expected = MARGIN + max(score for k, score in enumerate(scores) if k != label) - scores[label]
    assert expected > 0
    slopes = torch.autograd.grad(expected, list(trainable(pipe).values()))
    loss = fitting.group_loss(
        pipe,
        images,
        texts,
        timesteps=TIMESTEPS,
        noise=noise,
        label=label,
        attention_weight=weights[0],
        noise_weight=weights[1],
        margin=MARGIN,
    )
    # Sums of float64 in another order: the network's results differ by some 1e-14 of their largest value.
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    largest = max(float(slope.abs().max()) for slope in slopes)
    for (name, gradient), slope in zip(gradients(pipe, loss).items(), slopes, strict=True):
        torch.testing.assert_close(gradient, slope, rtol=0, atol=1e-12 * largest)
        # Where the image has one position, self-attention has nothing to choose from.
        assert slope.abs().max() > 1e-6 * largest or ("mid_block" in name and "attn1.to_" in name)


def test_gradient_is_the_slope_of_the_loss():
    pipe = adapted("sd21")
    arguments = {"timesteps": TIMESTEPS[:2], "noise": eps(2), "margin": MARGIN, "latents": eps(1, 1)}
    gradient = gradients(pipe, fitting.group_loss(pipe, [], TEXTS[:2], **arguments))
    generator = torch.Generator().manual_seed(0)
    # One parameter of each kind, each in another layer.
    kinds = [(layer, name, side) for layer in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0") for side in "AB"]
    for number, (layer, name, side) in enumerate(kinds):
        found = [key for key in gradient if f"attn{layer}.{name}.lora_{side}" in key]
        parameter = trainable(pipe)[found[number % len(found)]]
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        losses = []
        with torch.no_grad():
            for move in (1e-4, -2e-4):
                parameter += move * direction
                losses.append(fitting.group_loss(pipe, [], TEXTS[:2], **arguments, checkpointing=False).item())
            parameter += 1e-4 * direction
        slope = (losses[0] - losses[1]) / 2e-4
        expected = (parameter.grad * direction).sum().item()
        # A loss is a difference of norms near sqrt(4 · 8 · 8) = 16, whose float64 sums are off by some ten units in the
        # last place, 4e-14: over 2e-4 that is 2e-10. Of third derivatives near 0.1 a step of 1e-4 leaves 2e-10 too.
        assert slope == pytest.approx(expected, abs=1e-9)
        assert abs(expected) > 1e-5


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_checkpointing_changes_nothing(family):
    pipe = adapted(family, dtype=torch.float32)
    before = dict(pipe.unet.attn_processors)
    arguments = {"timesteps": TIMESTEPS[:2], "noise": eps(2), "margin": MARGIN}
    calls = Counter()
    pipe.unet.register_forward_pre_hook(lambda *_: calls.update(unet=1))
    results = []
    for checkpointing, total in ((True, 4), (False, 2)):
        calls.clear()
        loss = fitting.group_loss(pipe, pictures(1), TEXTS[:2], **arguments, checkpointing=checkpointing)
        assert calls["unet"] == 2
        results.append((loss, gradients(pipe, loss)))
        assert calls["unet"] == total
        assert all(processor is before[name] for name, processor in pipe.unet.attn_processors.items())
    (loss, grads), (plain_loss, plain_grads) = results
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(grads[name], plain_grads[name]) for name in grads)


@pytest.mark.parametrize(("family", "margin"), [("sd15", MARGIN), ("sd21", -MARGIN), ("sdxl", MARGIN)])
def test_a_group_costs_what_the_official_code_costs(family, margin):
    pipe = adapted(family, dtype=torch.float32)
    calls = Counter()

    def count(name):
        def hook(_, args, kwargs):
            first = args[0] if args else kwargs["sample"]
            calls[name, len(first)] += 1

        return hook

    encoders = ["text_encoder", "text_encoder_2"] if family == "sdxl" else ["text_encoder"]
    pipe.unet.register_forward_pre_hook(count("unet"), with_kwargs=True)
    pipe.vae.encoder.register_forward_pre_hook(count("vae"), with_kwargs=True)
    for name in encoders:
        getattr(pipe, name).register_forward_pre_hook(count(name), with_kwargs=True)

    K = 3
    arguments = {"timesteps": TIMESTEPS, "noise": eps(K), "margin": margin}
    loss = fitting.group_loss(pipe, pictures(1), TEXTS, **arguments)
    # Two rows for each candidate, both encoders anew, and the two texts by themselves.
    assert calls == {("unet", 2): K, ("vae", 1): K, **{(name, 1): 2 * K for name in encoders}}
    assert (loss.item() == 0) == (margin < 0)
    calls.clear()
    loss.backward()
    # Of every candidate, whether or not it has a gradient.
    assert calls == {("unet", 2): K}
    calls.clear()
    with torch.no_grad():
        fitting.group_loss(pipe, [], TEXTS, **arguments, latents=eps(1))
    assert calls == {("unet", 2): K, **{(name, 1): 2 * K for name in encoders}}


def test_margin_loss():
    scores = torch.tensor([1.0, 3.0, 2.5], requires_grad=True)
    assert fitting.margin_loss(scores).item() == pytest.approx(0.1 + 3.0 - 1.0)
    assert fitting.margin_loss(scores, 1).item() == 0
    assert fitting.margin_loss(scores, 2, margin=0.25).item() == pytest.approx(0.25 + 3.0 - 2.5)
    loss = fitting.margin_loss(scores, 1, margin=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert scores.grad.tolist() == [0, -1, 1]


def examples():
    first, second = pictures(2)
    return [([first], TEXTS[:2], 1), ([first, second], TEXTS[2:], 0), ([second], TEXTS[1:], 0)]


@pytest.mark.parametrize(("shared_noise", "steps"), [(False, 4), (True, 1)])
def test_fit_is_clipped_adamw_on_the_groups_losses(shared_noise, steps):
    settings = {"learning_rate": 1e-2, "margin": MARGIN, "seed": 5, "shared_noise": shared_noise}
    fitted = adapted("sd15")
    losses = fitting.fit(fitted, examples(), steps=steps, **settings)

    pipe, expected, seen, clipped = adapted("sd15"), [], [], 0
    parameters = trainable(pipe)
    first, second = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    for step in range(1, steps + 1):
        order = torch.randperm(3, generator=fitting.seeded(5, (step - 1) // 3, 0)).tolist()
        images, texts, label = examples()[order[(step - 1) % 3]]
        seen.append(order[(step - 1) % 3])
        timesteps, noise = fitting.draws(5, step - 1, 2, (4, SIDE, SIDE), shared_noise=shared_noise)
        assert (timesteps[0] == timesteps[1]) == torch.equal(noise[0], noise[1]) == shared_noise
        loss = fitting.group_loss(
            pipe, images, texts, timesteps=timesteps, noise=noise, label=label, margin=MARGIN, checkpointing=False
        )
        expected.append(loss.item())
        grads = gradients(pipe, loss)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in grads.values()))
        clipped += norm > 1
        with torch.no_grad():
            for name, parameter in parameters.items():
                # torch's clip_grad_norm_ adds 1e-6 to the norm.
                gradient = grads[name] * min(1.0, 1.0 / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
                parameter *= 1 - 1e-2 * 1e-2
                parameter -= 1e-2 * mean / (square.sqrt() + 1e-8)
    assert len(set(seen[:3])) == min(steps, 3)
    assert clipped > 0
    # AdamW divides by the gradient's own size, down to 1e-8: an element of size 1e-6, of a float64 gradient off by
    # 1e-15, moves by 1e-2 · 1e-9 too much.
    assert losses == pytest.approx(expected, rel=1e-9)
    for name, parameter in trainable(fitted).items():
        torch.testing.assert_close(parameter, parameters[name], rtol=0, atol=1e-9)


def test_fit_repeats_itself_by_the_seed_alone():
    results = []
    for seed, state, steps in ((0, 1, 3), (0, 2, 3), (1, 1, 1)):
        torch.manual_seed(state)
        pipe = adapted("sd15", dtype=torch.float32)
        frozen = {name: p.clone() for name, p in pipe.unet.named_parameters() if not p.requires_grad}
        losses = fitting.fit(pipe, examples(), steps=steps, seed=seed, margin=MARGIN, sample_posterior=True)
        assert all(torch.equal(p, frozen[name]) for name, p in pipe.unet.named_parameters() if name in frozen)
        assert all(p.grad is None for p in pipe.vae.parameters())
        results.append((losses, trainable(pipe)))
    (losses, weights), (again, weights_again), (other, _) = results
    assert losses == again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert losses[0] != other[0]


def test_draws_are_each_candidates_own():
    timesteps, noise = fitting.draws(3, 7, 4, (4, 2, 2))
    fewer, less = fitting.draws(3, 7, 2, (4, 2, 2))
    assert timesteps[:2] == fewer
    assert torch.equal(noise[:2], less)
    assert len({draw.sum().item() for draw in noise}) == 4
    for other in (fitting.draws(3, 8, 4, (4, 2, 2)), fitting.draws(4, 7, 4, (4, 2, 2))):
        assert not torch.equal(other[1], noise)
    many = torch.tensor([fitting.draws(0, step, 1, (1, 1, 1))[0][0] for step in range(2000)]).double()
    # The mean of 2000 uniform draws has a standard deviation of 1000 / sqrt(12 · 2000) = 6.5; four of them.
    assert many.mean().item() == pytest.approx(499.5, abs=26)
    assert many.min() < 10
    assert many.max() > 989
    assert max(fitting.draws(0, step, 1, (1,), train_timesteps=3)[0][0] for step in range(50)) == 2


def test_posterior_samples_are_drawn_for_each_candidate():
    pipe, images = adapted("sd21", dtype=torch.float32), pictures(1) * 2
    arguments = {"timesteps": [300, 300], "noise": eps(1).repeat(2, 1, 1, 1)}
    with torch.no_grad():
        pixels = fitting.preprocess(pipe, images[:1])
        posterior = pipe.vae.encode(pixels).latent_dist
        drawn = torch.randn(2, 1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(9))
        latents = torch.cat([0.18215 * (posterior.mean + posterior.std * sample) for sample in drawn])
        generator = torch.Generator().manual_seed(9)
        sampled = fitting.group_scores(pipe, images, TEXTS[:1], **arguments, sample_posterior=True, generator=generator)
        given = fitting.group_scores(pipe, [], TEXTS[:1], **arguments, latents=latents)
        # Rounding of a difference of norms near 16, as in test_matching.
        torch.testing.assert_close(sampled, given, rtol=0, atol=3e-5)
        means = fitting.group_scores(pipe, images, TEXTS[:1], **arguments)
    assert abs(sampled[0] - sampled[1]) > 1e-3
    assert means[0] == means[1]


@pytest.fixture(scope="module")
def plain():
    pipe = tiny_pipeline("sd15")
    pipe.unet.register_to_config(sample_size=SIDE)
    pipe.unet.requires_grad_(False)
    return pipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 3}, "label: got 3, expected 0 to 2"),
        ({"label": -1}, "label: got -1, expected 0 to 2"),
        ({"texts": TEXTS[:1]}, "images, texts: got 1 and 1, expected one image and at least two texts, or at least"),
        ({"images": []}, "images, texts: got 0 and 3, expected"),
        ({"images": pictures(2)}, "images, texts: got 2 and 3, expected"),
        ({"latents": eps(2)}, "latents, texts: got 2 and 3, expected"),
        ({"timesteps": [1, 2]}, "timesteps: got 2, expected 3, one for each candidate"),
        ({"timesteps": [1, 2, 1000]}, r"timesteps: got \[1, 2, 1000\], expected at least one, each from 0 to 999"),
        ({"noise": eps(2)}, r"noise: got shape \(2, 4, 8, 8\), expected \(3, 4, 8, 8\)"),
        ({"texts": ["dog " * 80, *TEXTS[1:]]}, "captions: 'dog .*' has 82 tokens, expected at most 77"),
    ],
)
def test_arguments_that_do_not_fit(plain, change, message):
    arguments = {"images": pictures(1), "texts": TEXTS, "timesteps": TIMESTEPS, "noise": eps(3), **change}
    with pytest.raises(ValueError, match=message):
        fitting.group_loss(plain, **arguments)


def test_fit_refuses_what_it_cannot_train(plain):
    with pytest.raises(ValueError, match="pipe: got a UNet without a parameter that requires a gradient"):
        fitting.fit(plain, examples(), steps=1)
    with pytest.raises(ValueError, match="examples: got none"):
        fitting.fit(plain, [], steps=1)
