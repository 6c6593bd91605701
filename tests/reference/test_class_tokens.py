"""The official loop of class tokens against its formulas, written a second time in float64, and its costs."""

import time
from collections import Counter

import diffusers
import pytest
import torch
from torch.nn import functional

from dsd_fast.reference import class_tokens
from tests.tiny import tiny_pipeline, tiny_scheduler

TOKEN = "<x>"
TEXTS = ["A photo of <x> cat", "a red <x> dog", "<x>"]
SIDE = 8


def pipeline(family, dtype=torch.float64, **options):
    pipe = tiny_pipeline(family, **options)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(pipe, part):
            getattr(pipe, part).to(dtype)
    pipe.unet.register_to_config(sample_size=SIDE)
    return pipe


def guide(pipe, outputs=3):
    """A linear classifier of images in [0, 1]."""
    pixels = 3 * (SIDE * pipe.vae_scale_factor) ** 2
    weight = torch.randn(pixels, outputs, generator=torch.Generator().manual_seed(5)) / pixels**0.5
    return lambda images: (images - 0.5).flatten(1) @ (8 * weight).to(images.dtype)


def eps(count, seed=0):
    return torch.randn(count, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def tables(pipe):
    return [encoder.get_input_embeddings().weight for encoder in encoders(pipe)]


def encoders(pipe):
    return [pipe.text_encoder, *([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])]


@torch.no_grad()
def encoded(pipe, text):
    """(empty, text) states, and their pooled ones, of one text by the pipeline itself."""
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    found = pipe.encode_prompt(text, **options)
    return (found[1], found[0]), found[3:1:-1]


@torch.no_grad()
def moved_loss(pipe, text, latents, target, classify, first, moved, calls, options):
    """Of one image whose first calls of the network see the table's rows ``first``, its last ones ``moved``."""
    ids = pipe.tokenizer.convert_tokens_to_ids([TOKEN, f"{TOKEN}_1"])
    rows = []
    for vectors in (first, moved):
        for table, each in zip(tables(pipe), vectors, strict=True):
            table[ids] = each
        rows.append(encoded(pipe, text))
    pipe.scheduler.set_timesteps(options["steps"])
    times, side = pipe.scheduler.timesteps, float(SIDE * pipe.vae_scale_factor)
    latents = latents.double() * pipe.scheduler.init_noise_sigma
    for place, t in enumerate(times):
        states, pooled = rows[place >= len(times) - calls]
        predicted = []
        for row in range(2):
            added = None
            if pooled:
                ids_ = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float64)
                added = {"text_embeds": pooled[row], "time_ids": ids_}
            scaled = pipe.scheduler.scale_model_input(latents, t)
            predicted.append(pipe.unet(scaled, t, states[row], added_cond_kwargs=added).sample)
        guided = predicted[0] + options["guidance"] * (predicted[1] - predicted[0])
        latents = pipe.scheduler.step(guided, t, latents).prev_sample
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    return functional.cross_entropy(classify(image.clamp(0, 1)), torch.tensor([target])).item()


@pytest.mark.parametrize(("family", "calls"), [("sd15", 1), ("sdxl", 2)])
def test_gradient_is_the_slope_through_the_last_calls(family, calls):
    pipe = pipeline(family)
    # Euler's steps round to float32.
    pipe.scheduler = tiny_scheduler("sd15")
    classify, made = guide(pipe), class_tokens.with_token(pipe, TOKEN, "a", vectors=2)
    options = {"steps": 3, "guidance": 3.0}
    losses, _ = class_tokens.backward(
        made, TOKEN, classify, TEXTS[:2], 1, eps(2), gradient_steps=calls, batch_size=2, **options
    )
    ids = made.tokenizer.convert_tokens_to_ids([TOKEN, f"{TOKEN}_1"])
    gradients = [table.grad for table in tables(made)]
    first = [table.detach()[ids].clone() for table in tables(made)]
    generator = torch.Generator().manual_seed(1)
    slopes, plain = [], []
    step = 1e-4
    for table, gradient in enumerate(gradients):
        assert not gradient[torch.isin(torch.arange(len(gradient)), torch.tensor(ids), invert=True)].any()
        direction = torch.randn(first[table].shape, generator=generator, dtype=torch.float64)
        ends = []
        for move in (step, -step):
            moved = [each + move * direction if place == table else each for place, each in enumerate(first)]
            found = [
                moved_loss(made, text, latents[None], 1, classify, first, moved, calls, options)
                for text, latents in zip(TEXTS, eps(2), strict=False)
            ]
            ends.append(sum(found) / 2)
        slopes.append((ends[0] - ends[1]) / (2 * step))
        plain.append(float((gradient[ids] * direction).sum()))
    # Losses near 1 are off by some 1e-14, over 2e-4 that is 1e-10; third derivatives add as much.
    assert plain == pytest.approx(slopes, rel=1e-5, abs=1e-9)
    assert min(map(abs, plain)) > 1e-4
    assert float(losses.mean()) == pytest.approx(sum(ends) / 2, abs=1e-4)


@pytest.mark.parametrize(("family", "guidance"), [("sd21", 1.0), ("sdxl", 4.0)])
def test_images_are_the_pipelines_own(family, guidance):
    pipe = pipeline(family, torch.float32)
    side = SIDE * pipe.vae_scale_factor
    with torch.no_grad():
        found = class_tokens.images(pipe, ["a cat", "dog"], eps(2), steps=3, guidance=guidance)
        size = {"height": side, "width": side, "output_type": "pt"}
        given = {"num_inference_steps": 3, "guidance_scale": guidance, "latents": eps(2)}
        expected = pipe(["a cat", "dog"], **given, **size).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_an_image_costs_what_the_official_code_costs():
    pipe = pipeline("sd15", torch.float32)
    made, classify, calls = class_tokens.with_token(pipe, TOKEN), guide(pipe), Counter()

    def count(name):
        return lambda _, args, kwargs: calls.update({(name, len(args[0] if args else kwargs["sample"])): 1})

    for name, module in (("text", made.text_encoder), ("unet", made.unet), ("vae", made.vae.decoder)):
        module.register_forward_pre_hook(count(name), with_kwargs=True)
    results = []
    for options in ({}, {"checkpointing": False}, {"batch_size": 3, "checkpointing": False}):
        calls.clear()
        made.text_encoder.zero_grad()
        losses, right = class_tokens.backward(made, TOKEN, classify, TEXTS, 1, eps(3), steps=4, **options)
        results.append((losses, right, made.text_encoder.get_input_embeddings().weight.grad))
        # PNDM makes five calls of four steps; two of them are made again for the gradient.
        again = 2 if not options else 0
        if "batch_size" in options:
            assert calls == {("text", 3): 2, ("unet", 6): 5, ("vae", 3): 1}
        else:
            assert calls == {("text", 1): 6, ("unet", 2): 3 * (5 + again), ("vae", 1): 3}
    (losses, right, gradient), *others = results
    for other_losses, other_right, other_gradient in others:
        torch.testing.assert_close(other_losses, losses, rtol=1e-4, atol=0)
        assert torch.equal(other_right, right)
        # float32: what other batches round differently, which guidance of 7 magnifies.
        torch.testing.assert_close(other_gradient, gradient, rtol=0, atol=1e-3 * float(gradient.abs().max()))
    calls.clear()
    with torch.no_grad():
        class_tokens.images(made, TEXTS[:1], eps(1), steps=4, guidance=1.0)
    assert calls == {("text", 1): 1, ("unet", 1): 5, ("vae", 1): 1}


@pytest.mark.alone
def test_it_spends_its_time_in_the_modules(monkeypatch):
    pipe = tiny_pipeline("sd15")
    made, inside, depth = class_tokens.with_token(pipe, TOKEN), 0.0, 0

    def timed(function):
        def call(*args, **kwargs):
            nonlocal inside, depth
            start, depth = time.process_time(), depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                # The backward pass calls the network again.
                depth -= 1
                inside += 0.0 if depth else time.process_time() - start

        return call

    for owner, name in ((made.unet, "forward"), (made.vae, "decode"), (made.text_encoder, "forward")):
        monkeypatch.setattr(owner, name, timed(getattr(owner, name)))
    monkeypatch.setattr(torch.autograd, "grad", timed(torch.autograd.grad))
    optimizer, latents = class_tokens.new_optimizer(made), torch.randn(2, 4, 16, 16)

    def share_outside():
        nonlocal inside
        inside, start = 0.0, time.process_time()
        class_tokens.update(made, optimizer, TOKEN, lambda x: x.mean((2, 3)), TEXTS[:2], 1, latents, steps=6)
        return 1 - inside / (time.process_time() - start)

    share_outside()
    assert min(share_outside() for _ in range(3)) < 0.10


def test_learning_is_adamw_on_the_tokens_row():
    pipe = pipeline("sd21")
    classify, before = guide(pipe), pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    options = {"steps": 2, "guidance": 2.0, "gradient_steps": 1}
    settings = {"learning_rate": 0.05, "weight_decay": 0.1, "decay_vocabulary": True, "accuracy": 1.0}
    learned = class_tokens.learn(
        pipe, classify, "Tiger_Cat", 2, latents=eps(2), orders=[[0, 1], [4, 2], [1, 0]], count=2, updates=3,
        batch_size=2, **settings, **options,
    )  # fmt: skip
    made = class_tokens.with_token(pipe)
    row = made.tokenizer.convert_tokens_to_ids("newclas")
    table = made.text_encoder.get_input_embeddings().weight
    names = [class_tokens.TEMPLATES[place].format("newclas") + " tiger cat" for place in (0, 1, 1, 2, 1, 0)]
    vectors, losses, first, second = [], [], 0.0, 0.0
    for number in range(1, 4):
        table.grad = None
        found, _ = class_tokens.backward(
            made, "newclas", classify, names[2 * number - 2 : 2 * number], 2, eps(2), batch_size=2, **options
        )
        losses.append(found.mean().item())
        gradient = table.grad[row].clone()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        step = first / (1 - 0.9**number) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
        with torch.no_grad():
            moved = (1 - 0.05 * 0.1) * table[row] - 0.05 * step
            table.mul_(1 - 0.05 * 0.1)
            table[row] = moved
        vectors.append(table[row].detach().clone())
    assert learned.losses == pytest.approx(losses, rel=1e-9)
    best = vectors[losses.index(min(losses))]
    torch.testing.assert_close(learned.vectors[0][0], best, rtol=0, atol=1e-9)
    start = before[pipe.tokenizer.encode("a", add_special_tokens=False)[0]]
    assert (best - start).abs().max() > 0.01
    # The pipeline is as it was.
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, before)
    assert "newclas" not in pipe.tokenizer.get_vocab()
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


@pytest.mark.parametrize("padded", [False, True])
def test_other_rows_stay_to_the_bit(padded):
    pipe = pipeline("sd15", torch.float32)
    made = class_tokens.with_token(pipe, TOKEN)
    optimizer, (table,) = class_tokens.new_optimizer(made, learning_rate=0.1), tables(made)
    before = table.detach().clone()
    lengths = []
    made.text_encoder.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    class_tokens.update(made, optimizer, TOKEN, guide(pipe), TEXTS[:2], 0, eps(2), steps=1, guidance=2.0, padded=padded)
    changed = (table != before).any(1).nonzero().flatten().tolist()
    assert changed == [made.tokenizer.convert_tokens_to_ids(TOKEN)]
    own = [len(made.tokenizer(text).input_ids) for text in TEXTS[:2]]
    assert lengths == ([77] * 4 if padded else [own[0], own[0], own[1], own[1]])
    with torch.no_grad():
        found, _ = class_tokens._texts(made, TEXTS[:1], True, padded, (SIDE, SIDE))
        states, _ = encoded(made, TEXTS[0])
        # Causal: what follows a token changes nothing before it.
        torch.testing.assert_close(found, torch.cat(states)[:, : found.shape[1]], rtol=0, atol=1e-5)


def scripted(*losses):
    """A guide of two outputs by which every image of update k has about that loss; 0 makes it right."""
    made = iter(losses)

    def classify(images):
        loss = next(made)
        wrong = torch.tensor([-float(loss), 0.0]) if loss else torch.tensor([9.0, 0.0])
        return images.flatten(1)[:, :2] * 0 + wrong

    return classify


@pytest.mark.parametrize(
    ("losses", "options", "ends"),
    [
        # One update more than patience says without a lower loss.
        ([3, 2, 4, 4, 4, 4], {"patience": 2}, 5),
        ([3, 2, 4, 1, 4, 4, 4, 4], {"patience": 2}, 7),
        ([3, 2, 0, 4], {"patience": 2}, 3),
        ([3, 2, 4], {"updates": 3}, 3),
        # The first update always has a lower loss than none.
        ([3, 4, 4, 4], {"patience": 1, "first_patience": 0}, 3),
    ],
)
def test_when_it_ends(losses, options, ends):
    pipe = pipeline("sd15", torch.float32)
    learned = class_tokens.learn(
        pipe, scripted(*losses), "cat", 0, count=1, steps=1, guidance=1.0, checkpointing=False, **options
    )
    assert len(learned.losses) == ends
    assert learned.accuracies[-1] == (0 in losses[:ends])


def test_a_collapse_changes_the_noise():
    pipe, seen = pipeline("sd15", torch.float32), []
    for collapse in (False, True):
        classify, seen_now = scripted(1, 1, 6, 1), []

        def watched(images, classify=classify, seen_now=seen_now):
            seen_now.append(images.detach())
            return classify(images)

        class_tokens.learn(
            pipe, watched, "cat", 0, count=1, updates=4, steps=1, guidance=1.0, collapse=collapse, learning_rate=1e-9
        )
        seen.append([float((each - seen_now[0]).abs().max()) > 1e-3 for each in seen_now])
    assert seen == [[False] * 4, [False, False, False, True]]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_loss_is_the_scripts(kind):
    pipe = pipeline("sd21", prediction_type=kind)
    made = class_tokens.with_token(pipe, TOKEN)
    latents, noise, times = eps(2).double(), eps(2, 1).double(), torch.tensor([700, 3])
    # Euler's own noises in another form.
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        states = torch.cat([encoded(made, text)[0][1] for text in TEXTS[:2]])
        predicted = pipe.unet(scheduler.add_noise(latents, noise, times), times, states).sample
        wanted = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, times)
        expected = functional.mse_loss(predicted, wanted, reduction="none").mean((1, 2, 3))
    found = class_tokens.noise_loss(made, TEXTS[:2], latents, times, noise)
    # diffusers rounds square roots of ᾱ in another order.
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), tables(made))
    assert gradient[made.tokenizer.convert_tokens_to_ids(TOKEN)].abs().max() > 0


def test_arguments_that_do_not_fit():
    pipe = tiny_pipeline("sd15")
    with pytest.raises(ValueError, match="initial: got 'dog cat', which has 2 tokens, expected one token"):
        class_tokens.with_token(pipe, TOKEN, "dog cat")
    with pytest.raises(ValueError, match="token: got '<x>', which the tokenizer has already"):
        class_tokens.with_token(class_tokens.with_token(pipe, TOKEN), TOKEN)
    with pytest.raises(ValueError, match=r"captions: 'dog .*' has 82 tokens, expected at most 77"):
        class_tokens.images(pipe, ["dog " * 80], torch.zeros(1, 4, 16, 16))
