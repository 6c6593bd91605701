"""Networks of 16 bits: what is made of their answers is float32, so a score loses no more than the plain way's does."""

import functools

import pytest
import torch

import dsd_fast as dsd
from dsd_fast.engine import Noised, draw_noise
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.examples import Examples
from dsd_fast.matching.fitting.learned import Learned
from dsd_fast.matching.fitting.objective import draw, losses, scores
from dsd_fast.reference import fitting as reference_fitting
from dsd_fast.reference import matching as reference
from dsd_fast.unet.network import Network
from tests.matching.fitting.parts import SIDE, TEXTS, gradients, learned, matcher, pipeline, training
from tests.matching.fitting.parts import groups as small_groups

TIMES = [300, 905]


@functools.cache
def pipelines(*settings, dtype=torch.bfloat16):
    """A pipeline of 16 bits, and one in float64 on the same rounded weights: the truth."""
    half, truth = (pipeline(*settings, dtype=dtype) for _ in range(2))
    truth.to(torch.float64)
    return half, truth


def images(pipe, count):
    height, width = dsd.from_pipeline(pipe).image_size
    return list(torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("settings", [("sd15", "epsilon"), ("sd21", "v_prediction"), ("sdxl", "epsilon")], ids=str)
def test_scores_lose_no_more_than_the_plain_ways(settings):
    half, truth = pipelines(*settings)
    given = [(255 * image).byte().permute(1, 2, 0).numpy() for image in images(half, 1)]
    right = matcher(truth, timesteps=TIMES, official=True).score(given, TEXTS).double()
    ours = matcher(half, timesteps=TIMES, official=True).score(given, TEXTS)
    plain = reference.score(half, given, TEXTS, timesteps=TIMES)
    assert ours.dtype == torch.float32
    # Of the same size, since both run the same network, which rounds each row its own way.
    assert 0 < (ours - right).norm() <= 2 * (plain - right).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pool", ["mean", "max", 0.5])
def test_norms_and_sums_of_the_networks_answers_are_not_rounded(dtype, pool):
    scorer = matcher(pipelines("sd15", "epsilon", dtype=dtype)[0], timesteps=TIMES, pool=pool)._scorer
    with torch.no_grad():
        latents = scorer.engine.encode_images(torch.stack(images(scorer.model.to_pipeline(), 2)).to(dtype) * 2 - 1)
    texts = scorer.encode_texts(TEXTS[:2], unconditional=False)
    rows, steps = torch.arange(2), len(TIMES)
    found = scorer.begin(latents, texts, rows, rows).done()
    epsilon = draw_noise([0], steps, latents.shape[1:])
    noised = Noised.grid(scorer.model.schedule, latents, epsilon, scorer.timesteps)
    latent_of, text_of = torch.arange(2 * steps), rows.repeat_interleave(steps)
    ((_, out),) = scorer.engine.rows(scorer.plan, noised.latents, noised.timesteps, texts, text_of, latent_of=latent_of)
    error = (noised.noise.double() - out.noise_pred.double()).flatten(1).norm(dim=1).view(2, steps)
    attention = sum(
        (out.scores[name].double() @ weight.double()).view(2, steps) for name, weight in scorer.weights.items()
    )
    assert {value.dtype for value in out.scores.values()} == {torch.float32}
    # Of a norm of 256 numbers, and of a sum of 24 heads: float32's roundings, where one of bfloat16 is 4e-3.
    torch.testing.assert_close(found.error, error, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.attention, attention, rtol=2e-6, atol=1e-6)
    mean = (0.5 * found.attention - found.error).mean(1)
    torch.testing.assert_close(scorer.score(latents, texts, rows, rows).double(), mean, rtol=1e-7, atol=0)


def test_gradients_of_a_fit_lose_no_more_than_the_plain_ways():
    fit = FitConfig(loss="margin", margin=10.0)
    found = []
    for pipe in pipelines("sd15", "epsilon"):
        made = learned(pipe, official=True)
        examples = Examples(made.scorer, small_groups()[:1])
        batch = draw(examples.queries, [(0, 0, 0)], (4, SIDE, SIDE), fit, 1000, True)
        losses(scores(made.scorer, made.weights(), examples, batch), batch, fit).sum().backward()
        ours = gradients(made)
        reference_fitting.group_loss(
            made.scorer.model.to_pipeline(),
            [],
            [TEXTS[n] for n in (0, 1, 2)],
            label=1,
            timesteps=batch.times[batch.latent_of].tolist(),
            noise=batch.noise[batch.latent_of],
            margin=10.0,
            latents=examples.latents[:1],
        ).backward()
        plain = gradients(made)
        assert {value.dtype for value in ours.values()} <= {torch.float32, torch.float64}
        found.append([torch.cat([value.double().flatten() for value in each.values()]) for each in (ours, plain)])
    (ours, plain), (right, plain_right) = found
    torch.testing.assert_close(right, plain_right, rtol=1e-4, atol=1e-6 * float(right.abs().max()))
    assert 0 < (ours - right).norm() <= 2 * (plain - right).norm()


def test_what_a_fit_learns_is_float32_from_the_first_weights_on():
    half, whole = pipelines("sd15", "epsilon")[0], pipeline()
    methods = ("lora", "prompt", "heads")
    first = [learn.parameters for learn in (training_of(pipe, methods) for pipe in (half, whole))]
    for name, value in first[0].items():
        assert value.dtype == torch.float32
        # The prompt begins as text states of the network's own type.
        assert name == "prompt" or torch.equal(value, first[1][name])
    under_way = training_of(half, methods, steps=2)
    under_way.run()
    states = under_way._optimizer.state
    assert {key.dtype for key in states} == {torch.float32}
    assert {value.dtype for state in states.values() for value in state.values()} == {torch.float32}


def training_of(pipe, methods, steps=1):
    fit = FitConfig(steps=steps, batch_size=2, prompt_tokens=2)
    return training(Learned(matcher(pipe)._scorer, None, methods, fit), fit)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_timesteps_and_sizes_keep_their_digits(family):
    """bfloat16 has 8 bits: of numbers above 256 it knows every second one, above 512 every fourth."""
    unet = pipelines(family, "epsilon")[0].unet
    times, sizes = torch.tensor([257, 501, 998]), torch.tensor([[1023.0, 769, 3, 0, 515, 1001]] * 3)
    seen = []
    modules = [unet.time_embedding.linear_1] + ([unet.add_embedding.linear_1] if family == "sdxl" else [])
    hooks = [module.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for module in modules]
    pooled = torch.zeros(3, 20, dtype=torch.bfloat16)
    given = (sizes, pooled) if family == "sdxl" else (None, None)
    Network.embed(unet, times, torch.bfloat16, None, *given, None, None)
    for hook in hooks:
        hook.remove()
    expected = [sinusoid(times, unet.config.block_out_channels[0])]
    if family == "sdxl":
        expected.append(torch.cat([pooled.double(), sinusoid(sizes.flatten(), 8).view(3, -1)], dim=1))
    for found, right in zip(seen, expected, strict=True):
        assert found.dtype == torch.bfloat16
        # Half a place of bfloat16, and of an angle of a thousand half a place of float32.
        torch.testing.assert_close(found.double(), right, rtol=2**-8, atol=1000 * 2**-24)


def sinusoid(values, width):
    """Ho et al. 2020: cosines and sines of geometric frequencies, in float64."""
    angles = values.double()[:, None] * 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)
