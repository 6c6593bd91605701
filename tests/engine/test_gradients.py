"""Gradients through the last calls of samplers: against differences, stock diffusers, and within a budget."""

import pytest
import torch

import dsd_fast as dsd
from dsd_fast.diffusion import guided, last_calls, sample, scheduler_timesteps
from dsd_fast.engine import Engine, Texts
from dsd_fast.engine.gradients import kept_bytes
from dsd_fast.models import Splice
from tests.tiny import load_tiny_lora, tiny_pipeline

PROMPTS = ["a <cat> cat", "a red <dog>"]
STEPS, SCALE = 3, 3.0


@pytest.fixture(scope="module")
def models():
    made = {}
    for family in ("sd15", "sdxl"):
        pipe = tiny_pipeline(family)
        for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
            if part is not None:
                part.double().requires_grad_(False)
        made[family] = dsd.from_pipeline(pipe)
    return made


@pytest.fixture
def model(models):
    return models["sd15"]


class Walk:
    """Images of two texts with a token each, guided, as a function of the tokens' vectors."""

    def __init__(self, model, last, **options):
        self.spliced = Splice(model, {"<cat>": 1, "<dog>": 1})
        self.engine = Engine(self.spliced.model, memory_budget=options.pop("memory_budget", None))
        self.last, self.options = last, options
        self.scheduler = model.new_scheduler()
        self.noise = normal(2, 4, *self.engine.latent_size, seed=1)
        self.weight = normal(*self.noise.shape, seed=2)
        self.banks = [0.3 * normal(2, width, seed=width) for width in self.spliced.widths]

    def predict(self, banks, **options):
        self.spliced.put(*banks)
        texts = Texts(self.spliced.model.encode_prompts(PROMPTS), self.engine.encode_prompts(None))
        numbers, latent_of = torch.tensor([2, 2, 0, 1]), torch.tensor([0, 1, 0, 1])
        return self.engine.predict(texts, numbers, latent_of=latent_of, gradients=self.last, **self.options, **options)

    @property
    def calls(self):
        return len(scheduler_timesteps(self.scheduler, STEPS))

    def loss(self, predict):
        return (sample(self.scheduler, predict, self.noise, steps=STEPS) * self.weight).sum()

    def gradients(self):
        banks = [bank.clone().requires_grad_() for bank in self.banks]
        predict = guided(self.predict(banks), SCALE)
        return torch.autograd.grad(self.loss(last_calls(predict, self.calls, self.last)), banks)

    @torch.no_grad()
    def after(self, moved):
        """The loss where the last calls have other vectors than those before."""
        first, rest = (guided(self.predict(banks), SCALE) for banks in (self.banks, moved))
        made = []

        def predict(latents, t):
            made.append(t)
            return (first if len(made) <= self.calls - self.last else rest)(latents, t)

        return self.loss(predict)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal_gradients(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("last", [1, 2])
def test_the_gradient_of_the_last_calls_is_that_of_differences(last, model):
    walk = Walk(model, last)
    (got,) = walk.gradients()
    direction, step = normal(*got.shape, seed=5), 1e-5
    ends = [walk.after([walk.banks[0] + sign * step * direction]) for sign in (1, -1)]
    # What curvature leaves is of the step's square, and rounding 1e-16 of the loss over the step.
    want = (ends[0] - ends[1]) / (2 * step)
    assert float((got * direction).sum()) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_gradient_is_that_of_the_official_loop_on_stock_diffusers(family, models):
    model = models[family]
    walk = Walk(model, 2)
    got = walk.gradients()
    learned = {
        token: {name: bank[row] for name, bank in zip(("clip_l", "clip_g"), walk.banks, strict=False)}
        for token, row in walk.spliced.rows.items()
    }
    pipe = model.with_tokens(learned).to_pipeline()
    encoders = filter(None, (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)))
    tables = [encoder.get_input_embeddings() for encoder in encoders]
    for table in tables:
        table.weight.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for number, prompt in enumerate(PROMPTS):
        states, absent, *pooled = pipe.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        states, added = torch.cat([absent, states]), None
        if pooled:
            ids = model.time_ids(*model.image_size).double()
            added = {"text_embeds": torch.cat(pooled[::-1]), "time_ids": ids.expand(2, -1)}
        scheduler = model.new_scheduler()
        scheduler.set_timesteps(STEPS)
        latents = walk.noise[number : number + 1] * scheduler.init_noise_sigma
        for step, t in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(step >= len(scheduler.timesteps) - 2):
                shown = scheduler.scale_model_input(latents.repeat(2, 1, 1, 1), t)
                u, c = pipe.unet(shown, t, states, added_cond_kwargs=added).sample.chunk(2)
                latents = scheduler.step(u + SCALE * (c - u), t, latents).prev_sample
        total = total + (latents * walk.weight[number]).sum()
    total.backward()
    # The tables' last rows are the tokens', in the order of the banks.
    want = [table.weight.grad[-2:] for table in tables]
    assert_equal_gradients(got, want, 1e-9)


def test_what_does_not_fit_is_computed_again_to_the_same_gradient(models):
    walk, found = Walk(models["sdxl"], 1), []
    row = row_bytes(walk)
    for options in ({}, {"checkpoint": True}, {"memory_budget": 5 * row}, {"memory_budget": row}):
        made = Walk(models["sdxl"], 1, **options)
        wanted = [made.noise, *made.banks]
        predict = made.predict([each.requires_grad_() for each in wanted[1:]])
        output = predict(wanted[0].requires_grad_(), 500)
        found.append(torch.autograd.grad(output.pow(2).sum(), wanted))
    for each in found[1:]:
        assert_equal_gradients(each, found[0], 1e-12)


def row_bytes(walk):
    predict = walk.predict([bank.requires_grad_() for bank in walk.banks])
    return kept_bytes(lambda: predict(walk.noise, 500.0, slice(2, 3)), walk.engine.model.unet)


def test_a_call_keeps_what_was_estimated_and_no_more_than_half_the_budget(model):
    walk = Walk(model, 1)
    banks = [bank.requires_grad_() for bank in walk.banks]
    row, latents = row_bytes(walk), walk.noise.requires_grad_()

    def kept(**options):
        made = Walk(model, 1, **options)
        predict = made.predict(banks)
        return kept_bytes(lambda: predict(latents, 500.0), made.engine.model.unet)

    # Keys of the absent text and what is shared between rows of one latent: a row has less than one alone.
    assert 3 * row < kept() < 4.1 * row
    assert kept(checkpoint=True) < row / 4
    for rows in (2, 3):
        assert kept(memory_budget=2 * rows * row + row // 2) < (rows + 0.5) * row
    texts = Texts(walk.spliced.model.encode_prompts(PROMPTS))
    assert Engine(walk.spliced.model, memory_budget=6 * row + row // 2).rows_differentiated(texts) == 3


def test_rows_that_no_gradient_reaches_are_computed_without(model):
    walk = Walk(model, 1)
    predict = walk.predict([bank.requires_grad_() for bank in walk.banks])
    half = kept_bytes(lambda: predict(walk.noise, 500.0), walk.engine.model.unet)
    every = kept_bytes(lambda: predict(walk.noise.clone().requires_grad_(), 500.0), walk.engine.model.unet)
    assert half < 0.6 * every
    # Nothing has a gradient.
    bare = walk.predict(walk.banks[0].detach()[None])
    assert not bare(walk.noise, 500.0).requires_grad


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_without_gradients_a_call_is_as_it_is_of_others(family, models):
    walk = Walk(models[family], 2)
    banks = [bank.requires_grad_() for bank in walk.banks]
    predict = walk.predict(banks)
    with torch.no_grad():
        want = walk.engine.predict(predict._differentiable.texts, predict._text_of, latent_of=predict._latent_of)(
            walk.noise, 500.0
        )
        assert torch.equal(predict(walk.noise, 500.0), want)
    assert not predict._differentiable._sizes
    got = predict(walk.noise, 500.0)
    assert got.requires_grad
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-12)
    part = predict(walk.noise, 500.0, slice(1, 4))
    torch.testing.assert_close(part.detach(), want[1:], rtol=0, atol=1e-12)


def test_each_latent_may_have_a_timestep_of_its_own(model):
    walk = Walk(model, 1)
    predict = walk.predict([bank.requires_grad_() for bank in walk.banks])
    got = predict(walk.noise, torch.tensor([100, 700]))
    for number, t in enumerate((100, 700)):
        own = slice(number, None, 2)
        torch.testing.assert_close(got[own], predict(walk.noise, t)[own], rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(predict(walk.noise, torch.tensor([100, 700])), got.detach(), rtol=0, atol=1e-12)


def test_adapters_count_again_where_rows_are_computed_again(tmp_path):
    pipe = tiny_pipeline("sd15")
    load_tiny_lora(pipe, "sd15", tmp_path, adapter_name="x")
    model, found = dsd.from_pipeline(pipe), {}
    spliced = Splice(model, {"<cat>": 1})
    bank = 0.3 * normal(1, 24, seed=3).float()
    for adapter in ("x", (), None):
        for checkpoint in (False, True):
            pipe.set_adapters("x", 1.0)
            engine, own = Engine(spliced.model, adapter), bank.clone().requires_grad_()
            spliced.put(own)
            with engine.adapters.active(texts_only=True):
                states = spliced.model.encode_prompts(["a <cat>"])
            predict = engine.predict(Texts(states), torch.tensor([0]), gradients=1, checkpoint=checkpoint)
            latents = normal(1, 4, *engine.latent_size, seed=4).float()
            output = predict(latents, 500)
            pipe.set_adapters("x", 0.3)
            found[adapter, checkpoint] = torch.autograd.grad(output.pow(2).sum(), own)
        assert_equal_gradients(found[adapter, True], found[adapter, False], 1e-6)
    assert (found["x", True][0] - found[(), True][0]).abs().max() > 0.1


def test_images_are_decoded_in_parts_to_the_same_gradient(model):
    engine = Engine(model)
    latents = normal(3, 4, *engine.latent_size, seed=6).requires_grad_()
    (want,) = torch.autograd.grad(engine.decode_latents(latents).pow(2).sum(), latents)
    row = kept_bytes(lambda: engine.decode_latents(latents[:1]), model.vae)
    assert engine.images_decoded() == 8
    small = Engine(model, memory_budget=4 * 2 * row + row)
    assert small.images_decoded() == 2
    leaf = latents.detach().requires_grad_()
    for part in (slice(0, 2), slice(2, 3)):
        small.decode_latents(leaf[part]).pow(2).sum().backward()
    torch.testing.assert_close(leaf.grad, want, rtol=0, atol=1e-12 * float(want.abs().max()))


def test_what_has_no_gradient_is_refused(model):
    engine = Engine(model)
    texts, numbers = engine.texts(["a"])
    with pytest.raises(ValueError, match="gradients: got 1 beside cache_interval 2, expected them without"):
        engine.predict(texts, numbers, gradients=1, cache_interval=2)
    with pytest.raises(ValueError, match="gradients: got 2 beside conditions"):
        engine.predict(texts, numbers, gradients=2, conditions=[torch.zeros(1, 3, 8, 8)])
