import diffusers
import pytest
import torch

from dsd_fast.diffusion import NoiseSchedule
from tests.tiny import tiny_scheduler

EPS32 = torch.finfo(torch.float32).eps
TIMESTEPS = [0, 1, 261, 500, 999]
CONVERSIONS = {"epsilon": "to_epsilon", "v_prediction": "to_v", "sample": "to_original"}


def schedule(prediction_type="epsilon", **config):
    return NoiseSchedule.from_scheduler(
        diffusers.DDIMScheduler(
            **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **config},
            prediction_type=prediction_type,
        )
    )


def exactly(scheduler):
    """Our schedule with diffusers' own float32 products, so that only the use of them is compared."""
    return NoiseSchedule(scheduler.alphas_cumprod.double(), scheduler.config.prediction_type)


def batch(dtype=torch.float64, rows=5):
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, rows, 4, 6, 5, generator=generator, dtype=torch.float64)
    return z0.to(dtype), noise.to(dtype)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3]},
        {"beta_schedule": "scaled_linear", "num_train_timesteps": 100},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    ],
)
def test_alphas_cumprod_are_diffusers(config):
    scheduler = diffusers.DDIMScheduler(**config)
    ours = NoiseSchedule.from_scheduler(scheduler)
    theirs = scheduler.alphas_cumprod.double()
    assert ours.alphas_cumprod.dtype == torch.float64
    assert ours.num_train_timesteps == len(theirs)
    # diffusers builds the product in float32: each of its S factors 1 - beta is rounded, and so is each product.
    bound = 3 * len(theirs) * EPS32
    relative = (ours.alphas_cumprod - theirs).abs() / ours.alphas_cumprod.clamp_min(1e-6)
    if config.get("rescale_betas_zero_snr"):
        # Subtracting the last root magnifies the relative error of the small roots; compare absolutely.
        assert (ours.alphas_cumprod - theirs).abs().max() < bound
        assert ours.alphas_cumprod[-1] == 0
    elif config.get("beta_schedule") == "squaredcos_cap_v2":
        # The last betas are close to 1, where rounding beta to float32 moves 1 - beta by up to eps / 0.001.
        assert relative[:-10].max() < 1e3 * EPS32
        # The last beta is capped.
        last = ours.alphas_cumprod[-2:]
        assert (last[1] / last[0]).item() == pytest.approx(0.001, rel=1e-12)
    else:
        assert relative.max() < bound


def test_from_scheduler_reads_configs():
    scheduler = tiny_scheduler("sd21", "v_prediction")
    from_object, from_config = NoiseSchedule.from_scheduler(scheduler), NoiseSchedule.from_scheduler(scheduler.config)
    assert torch.equal(from_object.alphas_cumprod, from_config.alphas_cumprod)
    assert from_object.prediction_type == from_config.prediction_type == "v_prediction"
    # Configs of SD 1.5's time name no prediction type.
    old = {"num_train_timesteps": 10, "beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "linear"}
    assert NoiseSchedule.from_scheduler(old).prediction_type == "epsilon"


def test_from_scheduler_refuses():
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="is a FlowMatchEulerDiscreteScheduler, expected one of a discrete diffusion"):
        NoiseSchedule.from_scheduler(flow)
    with pytest.raises(ValueError, match="is a FlowMatchEulerDiscreteScheduler, expected one of a discrete diffusion"):
        NoiseSchedule.from_scheduler(type(flow).from_config(dict(tiny_scheduler("sd15").config)))
    with pytest.raises(ValueError, match="scheduler config lacks beta_start, beta_end, beta_schedule, expected a sch"):
        NoiseSchedule.from_scheduler(flow.config)
    with pytest.raises(ValueError, match="beta_schedule is 'sigmoid', expected linear"):
        NoiseSchedule.from_scheduler(diffusers.DDPMScheduler(beta_schedule="sigmoid").config)
    with pytest.raises(ValueError, match="prediction_type is 'flow', expected one of"):
        NoiseSchedule(torch.ones(3, dtype=torch.float64), "flow")
    with pytest.raises(ValueError, match=r"alphas_cumprod has shape .* expected a non-empty 1-D float64 CPU tensor"):
        NoiseSchedule(torch.ones(3))
    with pytest.raises(ValueError, match="outside 0 to 1"):
        NoiseSchedule(torch.tensor([1.5], dtype=torch.float64))


def test_add_noise_is_the_formula_and_ddim():
    s = schedule()
    z0, noise = batch()
    a = s.alphas_cumprod[TIMESTEPS].reshape(-1, 1, 1, 1)
    expected = a**0.5 * z0 + (1 - a) ** 0.5 * noise
    torch.testing.assert_close(s.add_noise(z0, noise, TIMESTEPS), expected, rtol=1e-14, atol=1e-14)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs = scheduler.add_noise(z0.float(), noise.float(), torch.tensor(TIMESTEPS))
    ours = exactly(scheduler).add_noise(z0.float(), noise.float(), TIMESTEPS)
    # Two products and a sum below 8, their two roots rounded: at most 5 roundings.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * 5 * EPS32)


@pytest.mark.parametrize("t", [0, 9, 50, 500, 999])
def test_add_noise_is_eulers_add_noise_and_scaling(t):
    euler = tiny_scheduler("sd21")
    z0, noise = batch(torch.float32, 2)
    step = torch.tensor([t, t], dtype=torch.float32)
    theirs = euler.scale_model_input(euler.add_noise(z0, noise, step), step[0])
    # Values below 8; Euler rounds sigma, sigma², sigma² + 1, its root, the product, the sum and the quotient.
    torch.testing.assert_close(exactly(euler).add_noise(z0, noise, t), theirs, rtol=0, atol=8 * 10 * EPS32)


def test_add_noise_broadcasts_noise_and_takes_every_kind_of_timesteps():
    s = schedule()
    z0, noise = batch()
    shared = s.add_noise(z0, noise[0], 261)
    assert torch.equal(shared, s.add_noise(z0, noise[:1].expand_as(z0), [261] * len(z0)))
    assert torch.equal(shared, s.add_noise(z0, noise[0], torch.tensor(261)))
    assert torch.equal(shared, s.add_noise(z0, noise[0], torch.tensor([261] * len(z0), dtype=torch.int32)))


@pytest.mark.parametrize("predicted", list(CONVERSIONS))
@pytest.mark.parametrize("target", list(CONVERSIONS))
def test_conversions_recover_the_truth(predicted, target):
    s = schedule(predicted)
    z0, noise = batch()
    latents = s.add_noise(z0, noise, TIMESTEPS)
    a = s.alphas_cumprod[TIMESTEPS].reshape(-1, 1, 1, 1)
    truth = {"epsilon": noise, "sample": z0, "v_prediction": a**0.5 * noise - (1 - a) ** 0.5 * z0}
    result = getattr(s, CONVERSIONS[target])(truth[predicted], latents, TIMESTEPS)
    # float64 rounding of values below 10, divided by at least sqrt(1 - abar_0) = 0.029.
    torch.testing.assert_close(result, truth[target], rtol=0, atol=10 * 2.3e-16 / 0.029 * 4)


@pytest.mark.parametrize("predicted", list(CONVERSIONS))
def test_conversions_are_diffusers(predicted):
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DDIMScheduler(**config, prediction_type=predicted, clip_sample=False)
    scheduler.set_timesteps(1000)
    latents, output = batch(torch.float64, 1)
    for t in (1, 261, 500):
        theirs = scheduler.step(output, t, latents).pred_original_sample
        # diffusers rounds 1 - abar and two roots to float32; values below 30.
        torch.testing.assert_close(exactly(scheduler).to_original(output, latents, t), theirs, rtol=0, atol=120 * EPS32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_keep_the_dtype_and_are_rounded_once(dtype):
    s = schedule("v_prediction")
    z0, noise = batch(dtype)
    noised = s.add_noise(z0, noise, TIMESTEPS)
    assert noised.dtype == dtype
    # Storage rounds once; before it, two products and a sum below 8 have 4 roundings of the working precision.
    eps = torch.finfo(dtype).eps
    bound = {"rtol": eps / 2, "atol": 8 * 4 * min(EPS32, eps)}
    torch.testing.assert_close(noised.double(), s.add_noise(z0.double(), noise.double(), TIMESTEPS), **bound)
    epsilon = s.to_epsilon(noise, noised, TIMESTEPS)
    assert epsilon.dtype == dtype
    torch.testing.assert_close(epsilon.double(), s.to_epsilon(noise.double(), noised.double(), TIMESTEPS), **bound)


@pytest.mark.parametrize("predicted", list(CONVERSIONS))
def test_gradients(predicted):
    s = schedule(predicted)
    z0, noise = (x[:, :1, :2, :2].clone().requires_grad_() for x in batch())
    assert torch.autograd.gradcheck(lambda a, b: s.add_noise(a, b, TIMESTEPS), (z0, noise))
    for method in CONVERSIONS.values():
        assert torch.autograd.gradcheck(lambda a, b, m=method: getattr(s, m)(a, b, TIMESTEPS), (z0, noise))


def test_zero_terminal_snr():
    z0, noise = batch()
    last = [999] * len(z0)
    v = schedule("v_prediction", rescale_betas_zero_snr=True)
    assert torch.equal(v.add_noise(z0, noise, last), noise)
    torch.testing.assert_close(v.to_epsilon(-z0, noise, last), noise)
    torch.testing.assert_close(v.to_original(-z0, noise, last), z0)
    epsilon = schedule("epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="timesteps holds 999, where this schedule has no signal"):
        epsilon.to_original(noise, noise, last)
    assert torch.equal(epsilon.to_epsilon(noise, noise, last), noise)
    clean = NoiseSchedule(torch.tensor([1.0, 0.5], dtype=torch.float64), "sample")
    with pytest.raises(ValueError, match="timesteps holds 0, where this schedule has no noise"):
        clean.to_epsilon(z0, z0, 0)


@pytest.mark.parametrize("t", [-1, 1000, [0, 1, 2, 3, 1000]])
def test_timesteps_out_of_range(t):
    s = schedule()
    z0, noise = batch()
    bad = t if isinstance(t, int) else 1000
    with pytest.raises(ValueError, match=f"timesteps holds {bad}, expected 0 to 999"):
        s.add_noise(z0, noise, t)
    # Also where the conversion has nothing to do.
    with pytest.raises(ValueError, match=f"timesteps holds {bad}, expected 0 to 999"):
        s.to_epsilon(noise, z0, t)


def test_shapes_and_types_that_do_not_fit():
    s = schedule()
    z0, noise = batch()
    with pytest.raises(ValueError, match="timesteps has 2 entries, expected 1 or 5, one per row"):
        s.add_noise(z0, noise, [1, 2])
    with pytest.raises(ValueError, match=r"timesteps has dtype torch.float32, expected integers"):
        s.add_noise(z0, noise, 1.5)
    with pytest.raises(ValueError, match=r"noise has shape \(5, 4, 6, 4\), expected .* broadcasts to \(5, 4, 6, 5\)"):
        s.add_noise(z0, noise[..., :4], 1)
    with pytest.raises(ValueError, match=r"noise has shape \(1, 5, 4, 6, 5\)"):
        s.add_noise(z0, noise[None], 1)
    with pytest.raises(ValueError, match=r"model_output has shape \(4, 4, 6, 5\), expected \(5, 4, 6, 5\)"):
        s.to_epsilon(noise[:4], z0, 1)


def test_sigma_of_a_timestep_and_between_two_is_that_of_diffusers():
    euler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    schedule = NoiseSchedule.from_scheduler(euler)
    euler.set_timesteps(10)
    # Karras' levels lie between the schedule's, and the timesteps are found from them by diffusers.
    assert any(not float(t).is_integer() for t in euler.timesteps)
    found = [schedule.sigma(float(t)) for t in euler.timesteps]
    assert found == pytest.approx(euler.sigmas[:-1].tolist(), rel=1e-4)
    with pytest.raises(ValueError, match="timesteps holds 1000"):
        schedule.sigma(999.5)
    snr = NoiseSchedule.from_scheduler({**euler.config, "rescale_betas_zero_snr": True})
    assert snr.sigma(999) == float("inf")
