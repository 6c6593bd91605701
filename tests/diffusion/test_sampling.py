from contextlib import ExitStack

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

import dsd_fast as dsd
from dsd_fast.diffusion import (
    CLEAN,
    SAMPLERS,
    NoiseSchedule,
    RowNoise,
    guidance_embedding,
    guided,
    img2img,
    img2img_timestep,
    last_calls,
    named_scheduler,
    official_denoising,
    sample,
    scheduler_noised,
    scheduler_steps,
    scheduler_timesteps,
    within,
)
from tests.surroundings import SURROUNDINGS
from tests.tiny import tiny_scheduler

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "PNDM": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "DDIM": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "Euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "EulerLeading": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "Karras": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "Ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
    "DPM": (diffusers.DPMSolverMultistepScheduler, {}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
}


def scheduler(name):
    cls, extra = SCHEDULERS[name]
    return cls(**CONFIG, **extra)


def batch(rows=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, rows, 4, 6, 5, generator=generator)


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(scope="module")
def network(model):
    """Guided by 3, as the stock pipelines do it; the two prompts of the batch differ."""
    with torch.no_grad():
        states = model.encode_prompts(["", "", "a red circle", "a blue square"]).states

    def predict(latents, t):
        return model.unet(torch.cat([latents, latents]), t, encoder_hidden_states=states).sample

    return guided(predict, 3.0)


PROMPTS = ["a red circle", "a blue square"]
# Both sides run the same network on the same rows; float32 sums in another order are magnified by the guidance and by
# the steps. Values are of order 1.
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
@pytest.mark.newest
def test_img2img_is_the_stock_pipeline(name, model, network):
    parts = model.to_pipeline().components
    parts["scheduler"] = scheduler(name)
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    expected = pipe(
        prompt=PROMPTS,
        image=latents,
        strength=0.7,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        output_type="latent",
    ).images
    draws = RowNoise([7, 8], "diffusers")
    noise = draws.start((4, 16, 16))
    ours = img2img(scheduler(name), network, latents, noise, strength=0.7, steps=5, draws=draws)
    torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("name", ["PNDM", "Euler", "Ancestral"])
@torch.no_grad()
def test_sampling_is_the_stock_pipeline(name, model, network):
    pipe = model.to_pipeline()
    pipe.scheduler = scheduler(name)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt=PROMPTS,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        height=64,
        width=64,
        output_type="latent",
    ).images
    draws = RowNoise([7, 8], "diffusers")
    ours = sample(scheduler(name), network, draws.start((4, 16, 16)), steps=5, draws=draws)
    torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("name", ["DDIM", "Euler", "EulerLeading", "Heun", "DPM", "UniPC"])
def test_every_boundary_has_the_form_that_the_network_sees(name):
    ours = NoiseSchedule.from_scheduler(scheduler(name))
    z0, noise = batch()
    times = scheduler_timesteps(scheduler(name), 10, 0.5)
    called = []

    def predict(latents, t):
        called.append(t)
        return noise

    trajectory = list(scheduler_steps(scheduler(name), predict, ours.add_noise(z0, noise, times[0]), 10, 0.5))
    assert [t for t, _ in trajectory] == [*times, CLEAN]
    assert called == times
    for t, latents in trajectory:
        # Such a DDIM scheduler ends at timestep 0, which still has a little noise.
        level = 0 if t == CLEAN and name == "DDIM" else t
        expected = z0 if level == CLEAN else ours.add_noise(z0, noise, level)
        # With the true noise every method is exact. float32 sigmas, products of 1000 factors: some 1e-5 relative.
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_pndm_lags_one_step_when_it_starts_below_the_top():
    pndm = scheduler("PNDM")
    ours = NoiseSchedule.from_scheduler(pndm)
    z0, noise = batch()
    steps = list(scheduler_steps(pndm, lambda z, t: noise, ours.add_noise(z0, noise, 601), 10, 0.6, until=401))
    assert [t for t, _ in steps] == [601, 501, 401]
    for (_, latents), level in zip(steps, [601, 501, 501], strict=True):
        torch.testing.assert_close(latents, ours.add_noise(z0, noise, level), rtol=1e-4, atol=1e-4)
    # From the top its second timestep comes twice.
    assert scheduler_timesteps(pndm, 10)[:4] == [901, 801, 801, 701]


# Asked for 60 to 50: the updates of the official code, and the timesteps at its ends.
@pytest.mark.parametrize(("family", "updates", "first"), [("sd15", 11, 61), ("sd21", 9, 59), ("sdxl", 10, 60)])
def test_official_denoising(family, updates, first):
    given = tiny_scheduler(family)
    steps, strength = official_denoising(60, 50)
    assert img2img_timestep(given, 60) == first
    called = []

    def predict(latents, t):
        called.append(t)
        return torch.zeros_like(latents)

    latents, _ = batch()
    trajectory = list(scheduler_steps(given, predict, latents, steps, strength, until=50))
    assert (len(called), called[0], trajectory[-1][0]) == (updates, first, 50)
    torch.testing.assert_close(trajectory[0][1], latents, rtol=1e-6, atol=0)


def test_official_denoising_over_a_long_way():
    assert official_denoising(100, 50) == (1000, 0.1)
    steps, strength = official_denoising(200, 50)
    times = scheduler_timesteps(tiny_scheduler("sd15"), steps, strength)
    assert (steps, times[0], times[1]) == (100, 201, 191)


def test_the_scheduler_given_is_left_as_it_is():
    given = scheduler("Euler")
    before = dict(given.config), given.timesteps.clone(), given.num_inference_steps, given.step_index
    z0, noise = batch()
    first = img2img(given, lambda z, t: noise, z0, noise, strength=0.5, steps=4)
    after = dict(given.config), given.timesteps, given.num_inference_steps, given.step_index
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]
    config = {**given.config, "_class_name": "EulerDiscreteScheduler"}
    assert torch.equal(img2img(config, lambda z, t: noise, z0, noise, strength=0.5, steps=4), first)


def test_timesteps_are_ints_where_they_are_whole():
    times = scheduler_timesteps(scheduler("Euler"), 20)
    assert isinstance(times[0], int)
    assert times[:2] == [999, pytest.approx(999 - 999 / 19)]


def test_guidance_is_linear():
    latents, _ = batch()

    def predict(latents, t):
        return torch.cat([latents, 2 * latents])

    # u + s (c - u) with u = z and c = 2 z.
    torch.testing.assert_close(guided(predict, 3.0)(latents, 5), 4 * latents)


@pytest.mark.parametrize("rescale", [0.0, 0.7, [0.7, 0.3, 0.0]])
@pytest.mark.parametrize("scale", [5.0, [5.0, 1.0, 0.5]])
def test_guidance_is_of_each_row_as_diffusers_has_it(scale, rescale):
    unconditional, conditional = torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    scales, shares = (each if isinstance(each, list) else [each] * 3 for each in (scale, rescale))
    asked = [row for row in range(3) if scales[row] != 1]
    latents = torch.zeros(3, 4, 6, 5)
    got = guided(lambda z, t: torch.cat([unconditional[asked], conditional]), scale, rescale)(latents, 5)
    for row in range(3):
        u, c = unconditional[row : row + 1], conditional[row : row + 1]
        expected = u + scales[row] * (c - u)
        if scales[row] != 1 and shares[row]:
            expected = rescale_noise_cfg(expected, c, guidance_rescale=shares[row])
        torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1], conditional[1]) == (scales[1] == 1)


def test_without_guidance_the_prediction_is_itself():
    def predict(latents, t):
        return latents

    assert guided(predict, 1.0) is predict
    assert guided(predict, [1.0, 1.0], 0.7) is predict


def test_an_interval_is_open_below_and_closed_above():
    ours = NoiseSchedule.from_scheduler(scheduler("DDIM"))
    low, high = ours.sigma(300), ours.sigma(600)
    predict = within(ours, (low, high), lambda z, t: z + 1, lambda z, t: z)
    seen = [float(predict(torch.zeros(1), t)) for t in (300, 300.5, 301, 600, 600.5)]
    assert seen == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_guidance_magnifies_no_rounding(dtype):
    latents, noise = (each.to(dtype) for each in batch())
    found = guided(lambda both, t: torch.cat([latents, noise]), 7.5)(latents, 5)
    assert found.dtype == torch.float32
    right = latents.double() + 7.5 * (noise.double() - latents.double())
    # Three roundings of float32 of numbers up to 7.5 (|u| + |c|).
    torch.testing.assert_close(found.double(), right, rtol=0, atol=3 * 2**-24 * 7.5 * 8)


@pytest.mark.parametrize("width", [256, 13])
def test_guidance_embedding_is_that_of_diffusers(width):
    scales = [1.0, 7.5, 8.1]
    theirs = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([scale - 1 for scale in scales]), embedding_dim=width
    )
    assert torch.equal(guidance_embedding(scales, width), theirs)
    assert torch.equal(guidance_embedding(8.1, width), theirs[2:])
    with pytest.raises(ValueError, match="width is 3, expected at least 4"):
        guidance_embedding(1.0, 3)


def test_half_precision_stays_half_precision():
    z0, noise = (each.half() for each in batch())
    seen = []

    def predict(latents, t):
        seen.append(latents.dtype)
        return noise

    result = img2img(scheduler("DDIM"), predict, z0, noise, strength=0.5, steps=10)
    assert {*seen, result.dtype} == {torch.float16}
    # With the true noise the end is timestep 0 of z₀ and ε: |ε| √(1 - ᾱ₀) ≤ 4 · 0.03.
    assert float((result - z0).abs().max()) < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5}, "strength is 1.5, expected 0 to 1"),
        ({"strength": 0.05}, "strength is 0.05, too small for any of 10 steps"),
        ({"steps": 0}, "steps is 0, expected an integer of at least 1"),
        ({"noise": torch.zeros(3, 4, 2, 2)}, "noise has shape"),
    ],
)
def test_img2img_refuses(options, message):
    z0, noise = batch()
    arguments = {"noise": noise, "strength": 0.5, "steps": 10, **options}
    with pytest.raises(ValueError, match=message):
        img2img(scheduler("DDIM"), lambda z, t: z, z0, **arguments)


def test_more_steps_than_timesteps_are_refused():
    for name, steps in (("PNDM", 1000), ("PNDM", 1001), ("EulerLeading", 1001)):
        with pytest.raises(ValueError, match=f"steps is {steps}, more than {SCHEDULERS[name][0].__name__} has"):
            scheduler_timesteps(scheduler(name), steps)
    # Of which the official extractors take the last few.
    assert scheduler_timesteps(scheduler("PNDM"), 1000, 0.003) == [4, 3, 2, 1]


def test_noise_that_does_not_fit_is_refused_wherever_it_is_added():
    with pytest.raises(ValueError, match=r"noise has shape \(3, 4, 2, 2\), expected one that broadcasts to"):
        scheduler_noised(scheduler("DDIM"), batch()[0], torch.zeros(3, 4, 2, 2), 10, 0.5)


def test_scheduler_steps_refuses_an_end_before_its_start():
    with pytest.raises(ValueError, match="until is 600, expected at most 501"):
        scheduler_steps(scheduler("DDIM"), lambda z, t: z, batch()[0], 10, 0.6, until=600)


@pytest.mark.parametrize(("start", "t"), [(50, 50), (50, 60), (1000, 50), (50, 0)])
def test_official_denoising_refuses(start, t):
    with pytest.raises(ValueError, match="expected 0 < t < denoise_from < 1000"):
        official_denoising(start, t)


OTHERS = ("DDPMScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "SASolverScheduler", "TCDScheduler")


@pytest.mark.parametrize("name", [*SAMPLERS, *OTHERS])
def test_samples_are_of_the_rows_seeds_whatever_the_program_has_set(name):
    """UniPC solves a system that it makes in the default type, TCD's timesteps are multiplied by a number in it."""
    own = tiny_scheduler("sd15")
    own = named_scheduler(name, own) if name in SAMPLERS else getattr(diffusers, name).from_config(dict(own.config))

    def made():
        noise = RowNoise([1, 2**40])
        start, draws = noise.start((4, 6, 5)), {"steps": 5, "draws": noise}
        clean = torch.ones(2, 4, 6, 5, dtype=torch.float32, device="cpu")
        return sample(own, predict, start, **draws), img2img(own, predict, clean, start, strength=0.7, **draws)

    def predict(z, t):
        return (z + t / 1000).tanh()

    plain = made()
    for surroundings in SURROUNDINGS.values():
        with ExitStack() as stack:
            for context in surroundings():
                stack.enter_context(context)
            got = made()
        for one, other in zip(got, plain, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_gradients_go_through_the_last_calls_of_every_sampler(name):
    chosen = named_scheduler(name, tiny_scheduler("sd15"))
    start = batch()[0].double()
    direction = torch.linspace(-1, 1, start.numel(), dtype=torch.float64).view_as(start)
    count, made = len(scheduler_timesteps(chosen, 6)), []

    def end(before, after, last):
        """Where the last calls read another number than those before."""

        def predict(latents, t):
            made.append(t)
            return torch.tanh((before if len(made) <= count - last else after) * latents + t / 1000)

        made.clear()
        walk = last_calls(predict, count, last) if before is after else predict
        draws = RowNoise([0, 1, 2], dtype=torch.float64)
        return (sample(chosen, walk, start, steps=6, draws=draws) * direction).sum()

    for last in (1, 2, count):
        theta, step = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), 0.02
        (got,) = torch.autograd.grad(end(theta, theta, last), theta)
        assert len(made) == count
        with torch.no_grad():
            near, far = (end(theta, theta + k * step, last) - end(theta, theta - k * step, last) for k in (1, 2))
        # Exact to the step's fourth power; some schedulers step in float32, which leaves about 1e-6 over the step.
        assert float(got) == pytest.approx(float(8 * near - far) / (12 * step), rel=2e-4, abs=1e-3)
        assert abs(got) > 0.01


def test_more_calls_than_were_said_are_an_error_and_none_has_gradients_where_they_are_off():
    weight = torch.ones((), requires_grad=True)
    predict = last_calls(lambda latents, t: latents * weight, 2, 1)
    with torch.no_grad():
        assert not predict(torch.ones(1), 5).requires_grad
        assert not predict(torch.ones(1), 3).requires_grad
    with pytest.raises(ValueError, match="calls: got 2 for a walk that makes more"):
        predict(torch.ones(1), 1)
    for last in (0, 3):
        with pytest.raises(ValueError, match=f"last: got {last} of 2 calls, expected 1 to 2"):
            last_calls(lambda latents, t: latents, 2, last)
