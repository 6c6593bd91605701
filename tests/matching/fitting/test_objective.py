"""The loss of a step: the scores are the matcher's, the gradient that of the official way."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from dsd_fast.matching import Group
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.examples import Examples
from dsd_fast.matching.fitting.objective import draw, group_loss, losses, scores
from dsd_fast.reference import fitting as reference
from tests.matching.fitting.parts import SIDE, TEXTS, gradients, groups, largest, learned, pictures, pipeline

# So large that no margin is kept, and every group has a gradient.
MARGIN = 10.0


def drawn(examples, fit, compares_free=True, numbers=None, step=0):
    numbers = range(len(examples.queries)) if numbers is None else numbers
    return draw(
        [examples.queries[n] for n in numbers],
        [(0, step, n) for n in numbers],
        (4, SIDE, SIDE),
        fit,
        1000,
        compares_free,
    )


def exact_weights(made):
    """The official weights, equal ones; float32 knows a sixth to 3e-8 only."""
    every = len(made.scorer.weights)
    made.scorer.weights = {
        name: torch.full((len(value),), 1 / (every * len(value)), dtype=torch.float64)
        for name, value in made.scorer.weights.items()
    }
    return made


def our_gradient(made, examples, batch, fit, checkpoint=False):
    loss = losses(scores(made.scorer, made.weights(), examples, batch, checkpoint=checkpoint), batch, fit).sum()
    loss.backward()
    return float(loss.detach()), gradients(made)


def official_gradient(made, examples, batch, questions):
    """Each candidate by itself, in a stock pipeline on the network with the LoRA."""
    config, pipe = made.scorer.config, made.scorer.model.to_pipeline()
    # diffusers keeps them in float32.
    pipe.scheduler.alphas_cumprod = made.scorer.model.schedule.alphas_cumprod
    total, start = 0.0, 0
    for question in questions:
        rows = slice(start, start + max(len(question.images), len(question.texts)))
        start = rows.stop
        latents = batch.latent_of[rows]
        clean = examples.latents[batch.image_of[latents]]
        loss = reference.group_loss(
            pipe,
            [],
            question.texts,
            timesteps=batch.times[latents].tolist(),
            noise=batch.noise[latents],
            label=question.label,
            attention_weight=config.attention_weight,
            noise_weight=config.noise_weight,
            margin=MARGIN,
            checkpointing=False,
            latents=clean if len(question.images) > 1 else clean[:1],
        )
        loss.backward()
        total += float(loss.detach())
    return total, gradients(made)


def adapted(family, prediction_type="epsilon", dtype=torch.float64, **settings):
    fit = FitConfig(attention="all")
    return exact_weights(learned(pipeline(family, prediction_type, dtype), fit=fit, **settings))


@pytest.fixture(scope="module", params=[("sd15", "epsilon"), ("sd21", "v_prediction"), ("sdxl", "epsilon")])
def made(request):
    return adapted(*request.param)


def both_ways(made, shared, questions=None, official=True):
    made.scorer.config = replace(made.scorer.config, official=official)
    made.scorer.needs_unconditional |= official
    fit = FitConfig(loss="margin", margin=MARGIN, shared_noise=shared)
    questions = groups()[:2] if questions is None else questions
    examples = Examples(made.scorer, questions)
    batch = drawn(examples, fit)
    return our_gradient(made, examples, batch, fit), official_gradient(made, examples, batch, questions)


def assert_equal(ours, official):
    (loss, got), (official_loss, want) = ours, official
    # Sums of float64 in another order.
    assert loss == pytest.approx(official_loss, rel=1e-10)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-10 * largest(want))
    # The gradient is no matter of a few layers.
    assert sum(float(value.abs().max()) > 1e-3 * largest(want) for value in want.values()) > len(want) / 4


def test_gradient_is_that_of_the_official_way(made):
    """Rows shared between candidates, unconditional rows left out where all have the same: still its gradient."""
    modes = {"sd1": (True, False), "sd2": (False,), "sdxl": (True,)}[made.scorer.model.family]
    for shared in modes:
        assert_equal(*both_ways(made, shared))


def test_the_default_score_of_one_image_has_the_official_gradient(made):
    """The attention of the unconditional row, which it lacks, is the same for all texts."""
    questions = [group for group in groups() if len(group.images) == 1]
    assert_equal(*both_ways(made, True, questions, official=False))


def test_without_the_noise_part_what_does_not_run_has_no_gradient():
    made = adapted("sd21", noise_weight=0.0)
    ours, (official_loss, want) = both_ways(made, False)
    assert_equal(ours, (official_loss, {name: want[name] for name in ours[1]}))
    # The last scores are those of the last transformers: only what follows the scores in these does not run.
    others = want.keys() - ours[1].keys()
    assert others
    assert all(float(want[name].abs().max()) == 0 for name in others)


def test_float32_gradient_is_as_exact_as_the_official_one():
    truth = both_ways(adapted("sd21"), False, groups()[:1])[1][1]
    (_, got), (_, plain) = both_ways(adapted("sd21", dtype=torch.float32), False, groups()[:1])

    def error(found):
        return max(float((found[name].double() - value).abs().max()) for name, value in truth.items())

    # Rounding noise of two computations of the same: neither may be far worse than the other.
    assert error(got) <= 3 * error(plain)


def test_texts_of_one_image_cost_one_row_each():
    made = learned(pipeline())
    examples = Examples(made.scorer, groups())
    rows = Counter()
    made.scorer.model.unet.conv_in.register_forward_hook(lambda m, a, out: rows.update(shared=len(out)))
    made.scorer.model.unet.conv_out.register_forward_hook(lambda m, a, out: rows.update(text=len(out)))
    with torch.no_grad():
        for shared, number, want in (
            (True, 0, {"shared": 1, "text": 3}),
            # Two images, with their unconditional rows.
            (True, 1, {"shared": 2, "text": 4}),
            (False, 0, {"shared": 3, "text": 6}),
        ):
            rows.clear()
            batch = drawn(examples, FitConfig(shared_noise=shared), numbers=[number])
            scores(made.scorer, made.weights(), examples, batch)
            assert rows == want, (shared, number)


@pytest.mark.parametrize(
    ("family", "settings", "methods"),
    [
        ("sd15", {}, ("lora",)),
        ("sd15", {"tokens": "real", "pool": "max", "attention_weight": 2.0}, ("lora", "prompt")),
        ("sd21", {"noise_weight": 0.0, "pool": 0.5}, ("prompt",)),
        ("sd21", {"attention_weight": 0.0}, ("lora",)),
        ("sdxl", {"layers": {"mid-vit-block2-cross": (0.1, 0.4, 0.2, 0.3)}}, ("prompt", "heads")),
    ],
)
def test_scores_are_the_matchers_and_the_gradient_is_their_slope(family, settings, methods):
    """Also where there is no official way: the default score of several images, learned vectors, weights of heads."""
    made = learned(pipeline(family, dtype=torch.float64), methods, **settings)
    examples = Examples(made.scorer, groups())
    fit = FitConfig(shared_noise=False)
    batch = drawn(examples, fit, made.scorer.needs_unconditional)
    got = scores(made.scorer, made.weights(), examples, batch)

    scorer = made.current()
    captions = scorer.encode_texts(list(dict.fromkeys(text for group in groups() for text in group.texts)))
    for row, text in enumerate(batch.text_of.tolist()):
        latent = int(batch.latent_of[row])
        scorer.timesteps = [int(batch.times[latent])]
        clean = examples.latents[batch.image_of[latent]][None]
        terms = scorer.begin(
            clean, captions, torch.tensor([0]), torch.tensor([text]), epsilon=batch.noise[latent][None]
        ).done()
        # The matcher gathers its terms in float32.
        assert float(sum(scorer.parts(terms))) == pytest.approx(float(got[row].detach()), rel=1e-5, abs=1e-5)

    got.sum().backward()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("prompt", "heads", "lora.down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k.lora_B"):
            for parameter in (p for key, p in made.parameters.items() if key.startswith(name)):
                direction = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                # The weights of heads, float32, are many times their rounding apart.
                width = 1e-5 if parameter.dtype == torch.float64 else 1e-1
                values = []
                for sign in (1, -1):
                    before = parameter.clone()
                    parameter.add_(sign * width * direction)
                    values.append(float(scores(made.scorer, made.weights(), examples, batch).sum()))
                    parameter.copy_(before)
                slope = float((parameter.grad * direction).sum())
                assert (values[0] - values[1]) / (2 * width) == pytest.approx(slope, rel=1e-4, abs=1e-5)
                assert slope != 0


def test_draws_of_a_group_depend_on_its_key_alone():
    made = learned(pipeline())
    examples = Examples(made.scorer, groups())
    for fit in (FitConfig(), FitConfig(shared_noise=False)):
        whole = drawn(examples, fit)
        latents = 0
        for number in range(3):
            alone = drawn(examples, fit, numbers=[number])
            own = slice(latents, latents := latents + len(alone.times))
            assert torch.equal(whole.times[own], alone.times)
            assert torch.equal(whole.noise[own], alone.noise)
        assert not torch.equal(drawn(examples, fit, step=1).noise, whole.noise)
    # Shared, the candidates have one timestep and one noise; else each its own.
    shared, own = (drawn(examples, FitConfig(shared_noise=value), numbers=[1]) for value in (True, False))
    assert torch.equal(shared.noise[0], shared.noise[1])
    assert shared.times[0] == shared.times[1]
    assert not torch.equal(own.noise[0], own.noise[1])
    # Another group in the same place draws the same.
    first, other = (draw([examples.queries[n]], [(5, 6, 7)], (4, SIDE, SIDE), FitConfig(), 1000, True) for n in (0, 2))
    assert torch.equal(first.noise, other.noise)
    assert torch.equal(first.times, other.times)


def test_timesteps_are_drawn_uniformly_from_the_range():
    made = learned(pipeline())
    query = Examples(made.scorer, groups()).queries[0]
    fit = FitConfig(timestep_range=(20, 24))
    batch = draw([query] * 400, [(0, 0, place) for place in range(400)], (1, 1, 1), fit, 1000, True)
    counts = torch.bincount(batch.times, minlength=24)
    assert counts[:20].sum() == 0
    # Four standard deviations of a binomial count of 400 with p = 1/4.
    assert (counts[20:24] - 100).abs().max() <= 4 * (400 * 0.25 * 0.75) ** 0.5


def test_losses_are_their_formulas():
    values = torch.tensor([1.0, 3.0, 2.5], dtype=torch.float64)
    margin = group_loss(values, 2, FitConfig(loss="margin", margin=0.2))
    assert float(margin) == pytest.approx(0.2 + 3.0 - 2.5)
    assert float(group_loss(values, 1, FitConfig(loss="margin", margin=0.2))) == 0
    got = group_loss(values, 2, FitConfig(temperature=0.5))
    assert float(got) == pytest.approx(float((values / 0.5).exp().sum().log() - 2.5 / 0.5))


def test_images_and_texts_go_through_their_encoders_once():
    images = pictures(2)
    questions = [*groups(), *groups(), Group(tuple(images), tuple(TEXTS[:2]))]
    made = learned(pipeline())
    rows = Counter()
    made.scorer.model.vae.encoder.register_forward_hook(lambda m, a, out: rows.update(images=len(out)))
    examples = Examples(made.scorer, questions)
    # groups() makes its arrays anew: 4 and 4, and the two of the paired group.
    assert rows["images"] == len(examples.latents) == 10
    assert [(q.images, q.texts, q.label) for q in examples.queries[6:]] == [
        ((8,), (0, 1), 0),
        ((9,), (0, 1), 1),
        ((8, 9), (0,), 0),
        ((8, 9), (1,), 1),
    ]
    states = examples.states([1, 0])
    want = made.scorer.model.encode_prompts([TEXTS[1], TEXTS[0]])
    assert torch.equal(states.states, want.states)
