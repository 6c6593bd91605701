import diffusers
import pytest
import torch

from dsd_fast.diffusion import CLEAN, NoiseSchedule, ddim_step, denoise, inversion_grid, invert
from tests.tiny import tiny_scheduler

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ["epsilon", "v_prediction", "sample"]


def schedule(kind="epsilon"):
    return NoiseSchedule.from_scheduler(diffusers.DDIMScheduler(**CONFIG, prediction_type=kind))


def diffusers_schedule(scheduler):
    """Our schedule with diffusers' own float32 products, so that only the use of them is compared."""
    return NoiseSchedule(scheduler.alphas_cumprod.double(), scheduler.config.prediction_type)


def batch(rows=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, rows, 4, 6, 5, generator=generator, dtype=torch.float64)


def truth(ours, z0, noise):
    """The network that knows the noise of every latent on the way between z₀ and it."""

    def predict(latents, t):
        a, s = (ours.alphas_cumprod[t].sqrt(), (1 - ours.alphas_cumprod[t]).sqrt())
        return {"epsilon": noise, "v_prediction": a * noise - s * z0, "sample": z0}[ours.prediction_type]

    return predict


def curved(latents, t):
    """A nonlinear network; every number depends on all of its arguments."""
    return torch.sin(latents + t / 300) + 0.1 * latents.mean(dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", [0, 40, 700, CLEAN])
def test_step_with_the_true_noise_is_the_closed_form(kind, to):
    ours = schedule(kind)
    z0, noise = batch()
    t = 300
    latents = ours.add_noise(z0, noise, t)
    expected = z0 if to == CLEAN else ours.add_noise(z0, noise, to)
    # float64: some ten roundings, magnified by 1 / √(1 - ᾱ) ≤ 3 where z₀ predictions are divided by the noise level.
    torch.testing.assert_close(
        ddim_step(ours, truth(ours, z0, noise)(latents, t), latents, t, to), expected, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("kind", KINDS)
def test_step_is_that_of_diffusers(kind):
    theirs = diffusers.DDIMScheduler(**CONFIG, prediction_type=kind, clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(20)
    latents, output = batch()
    ours = diffusers_schedule(theirs)
    for t, to in [(900, 850), (50, 0), (0, CLEAN)]:
        expected = theirs.step(output, t, latents).prev_sample
        # diffusers takes the roots of float32 products: a few eps, magnified by √((1 - ᾱ) / ᾱ) < 14 at 900, and for a
        # z₀ prediction by 1 / √(1 - ᾱ) = 35 at 0.
        torch.testing.assert_close(ddim_step(ours, output, latents, t, to), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_step_upwards_is_that_of_diffusers_inverse(kind):
    theirs = diffusers.DDIMInverseScheduler(**CONFIG, prediction_type=kind, clip_sample=False)
    theirs.set_timesteps(20)
    latents, output = batch()
    expected = theirs.step(output, 450, latents).prev_sample
    # As above, with √((1 - ᾱ) / ᾱ) < 2 and 1 / √(1 - ᾱ) < 2.
    torch.testing.assert_close(
        ddim_step(diffusers_schedule(theirs), output, latents, 400, 450), expected, rtol=2e-6, atol=2e-6
    )


def test_step_with_v_at_zero_terminal_snr():
    abar = schedule().alphas_cumprod.clone()
    abar[-1] = 0
    ours = NoiseSchedule(abar, "v_prediction")
    z0, noise = batch()
    # All noise: v = -z₀.
    torch.testing.assert_close(
        ddim_step(ours, -z0, noise, 999, 500), ours.add_noise(z0, noise, 500), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("kind", KINDS)
def test_denoise_follows_the_true_noise_exactly(kind):
    ours = schedule(kind)
    z0, noise = batch()
    calls = []

    def predict(latents, t):
        calls.append(t)
        return truth(ours, z0, noise)(latents, t)

    steps = [800, 500, 499, 50, 0]
    trajectory = list(denoise(ours, predict, ours.add_noise(z0, noise, 800), steps))
    assert [t for t, _ in trajectory] == steps
    assert calls == steps[:-1]
    for t, latents in trajectory:
        expected = ours.add_noise(z0, noise, t) if t else z0
        torch.testing.assert_close(latents, expected, rtol=1e-12, atol=1e-12)


def test_denoise_keeps_rows_apart():
    latents, _ = batch()
    together = list(denoise(schedule(), curved, latents, [600, 400, 10]))
    for row in range(len(latents)):
        alone = list(denoise(schedule(), curved, latents[row : row + 1], [600, 400, 10]))
        for (_, many), (_, one) in zip(together, alone, strict=True):
            torch.testing.assert_close(many[row : row + 1], one, rtol=1e-13, atol=1e-13)


def test_small_steps_are_not_lost_in_half_precision():
    ours = schedule()
    z0, noise = batch()
    latents = ours.add_noise(z0, noise, 100).bfloat16()
    steps = list(range(100, 49, -1))
    *_, (_, slow) = denoise(ours, lambda z, t: noise.bfloat16(), latents, steps)
    *_, (_, fast) = denoise(ours, lambda z, t: noise.bfloat16(), latents, [100, 50])
    assert slow.dtype == torch.bfloat16
    # The same straight line in 50 pieces and in one: equal but for the last rounding to bfloat16.
    torch.testing.assert_close(slow, fast, rtol=2**-7, atol=0)


def official_inversion(abar, predict, z0, stop, grid, stride):
    """Darkbblue/generic-diffusion-feature's loop, written from its formula."""
    z = z0
    for t in grid[1:]:
        output = predict(z, t)
        a, b = abar[max(0, t - stride)], abar[t]
        z = (z - (1 - a).sqrt() * output) * (b / a).sqrt() + (1 - b).sqrt() * output
        if t >= stop:
            break
    return z


def test_inversion_is_the_official_one():
    ours = schedule()
    z0, _ = batch()
    calls = []

    def predict(latents, t):
        calls.append(t)
        return curved(latents, t)

    asked = [0, 5, 11, 51, 52, 52, 200]
    results = list(invert(ours, predict, z0, asked))
    assert calls == list(range(11, 202, 10))
    assert [t for t, _ in results] == asked
    assert torch.equal(results[0][1], z0)
    for t, latents in results[1:]:
        expected = official_inversion(ours.alphas_cumprod, curved, z0, t, range(1, 1000, 10), 10)
        torch.testing.assert_close(latents, expected, rtol=1e-12, atol=1e-12)


def test_inversion_needs_five_predictions_for_timestep_50():
    calls = []
    list(invert(schedule(), lambda z, t: calls.append(t) or z, batch()[0], [50]))
    assert calls == [11, 21, 31, 41, 51]


def test_inversion_stops_at_the_end_of_the_grid():
    ours = schedule()
    z0, _ = batch()
    (_, last), (_, beyond) = invert(ours, curved, z0, [991, 999])
    assert torch.equal(last, beyond)


def test_inversion_grids_of_the_families():
    assert inversion_grid(tiny_scheduler("sd15")) == list(range(1, 1000, 10))
    linear = inversion_grid(tiny_scheduler("sd21"))
    assert (len(linear), linear[:3], linear[-1]) == (100, [0, 10, 20], 999)
    z0, _ = batch()
    ((_, latents),) = invert(schedule(), curved, z0, [300], grid=linear)
    expected = official_inversion(schedule().alphas_cumprod, curved, z0, 300, linear, 10)
    torch.testing.assert_close(latents, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_exact_inversion_ends_where_asked(kind):
    ours = schedule(kind)
    z0, noise = batch()
    asked = [0, 4, 50, 51, 995]

    def predict(latents, t):
        # v of the latent's own level is what the step reads.
        levels = [CLEAN, *range(11, 1000, 10)]
        level = max(each for each in levels if each < t)
        abar = torch.ones((), dtype=torch.float64) if level == CLEAN else ours.alphas_cumprod[level]
        return noise if kind == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * z0

    results = list(invert(ours, predict, z0, asked, exact=True))
    assert [t for t, _ in results] == asked
    for t, latents in results:
        expected = ours.add_noise(z0, noise, t) if t else z0
        torch.testing.assert_close(latents, expected, rtol=1e-11, atol=1e-11)


def test_exact_inversion_does_not_depend_on_what_else_is_asked():
    z0, _ = batch()
    many = dict(invert(schedule(), curved, z0, [7, 33, 41, 250], exact=True))
    for t, latents in many.items():
        ((_, alone),) = invert(schedule(), curved, z0, [t], exact=True)
        assert torch.equal(alone, latents)


def test_exact_inversion_needs_no_side_step_to_the_grid():
    calls = []
    list(invert(schedule(), lambda z, t: calls.append(t) or z, batch()[0], [21, 24, 31], exact=True))
    assert calls == [11, 21, 24, 31]


def test_inversion_and_denoising_are_inverse_for_a_smooth_network():
    ours = schedule()
    z0, _ = batch()
    errors = []
    for count in (50, 100, 200):
        grid = [round(k * 500 / count) for k in range(count + 1)]
        ((_, up),) = invert(ours, curved, z0, [500], grid=grid, exact=True)
        *_, (_, back) = denoise(ours, curved, up, grid[::-1])
        errors.append(float((back - z0).norm() / z0.norm()))
    # Both are first-order methods for the same differential equation: half the step, half the error.
    assert errors[0] < 0.1
    assert 1.6 < errors[0] / errors[1] < 2.5
    assert 1.6 < errors[1] / errors[2] < 2.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, z: denoise(s, curved, z, []), "timesteps is empty"),
        (lambda s, z: denoise(s, curved, z, [10, 10]), "expected strictly descending"),
        (lambda s, z: denoise(s, curved, z, [1000, 10]), "timesteps holds 1000, expected integers from 0 to 999"),
        (lambda s, z: invert(s, curved, z, [50, 10]), "until is .* expected ascending"),
        (lambda s, z: invert(s, curved, z, [2.5]), "until holds 2.5"),
        (lambda s, z: invert(s, curved, z, [10], grid=[5]), "grid is .* expected at least two timesteps"),
        (lambda s, z: invert(schedule("sample"), curved, z, [10], exact=True), "exact is True, expected False"),
        (lambda s, z: ddim_step(s, z, z, 1000, 3), "t is 1000, expected -1 to 999"),
        (lambda s, z: ddim_step(s, z, z, 10, -2), "to is -2"),
        (lambda s, z: ddim_step(s, z[:1], z, 10, 3), "output has shape"),
        (lambda s, z: ddim_step(schedule("sample"), z, z, CLEAN, 3), "t is -1"),
    ],
)
def test_refuses(call, message):
    # Before anything is iterated.
    with pytest.raises(ValueError, match=message):
        call(schedule(), batch()[0])
