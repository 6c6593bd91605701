"""What a scheduler object holds and its config does not: its own numbers count, or it is refused by name."""

import contextlib
import functools
import inspect
import warnings

import diffusers
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.diffusion import (
    NoiseSchedule,
    changed_in_place,
    fresh_scheduler,
    img2img_timestep,
    sample,
    scheduler_steps,
    scheduler_timesteps,
)
from dsd_fast.engine.fingerprint import scheduler_settings
from tests.tiny import tiny_pipeline, tiny_scheduler

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PLAIN = {"DDIM": {}, "DDPM": {}, "PNDM": {"skip_prk_steps": True}, "LCM": {}, "TCD": {}}
WITH_SIGMAS = ("EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete", "LMSDiscrete")
TIMES = [1, 500, 900]


def made(name, **config):
    return getattr(diffusers, f"{name}Scheduler")(**BETAS, **PLAIN.get(name, {}), **config)


def zero_terminal(scheduler):
    """As scripts do, by Lin et al. 2023, algorithm 1."""
    root = scheduler.alphas_cumprod.sqrt()
    scheduler.alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def noised(scheduler, times=TIMES):
    """z₀, ε, and what the scheduler's own rule makes of them for the UNet."""
    z0, noise = torch.randn(2, len(times), 4, 2, 2, generator=torch.Generator().manual_seed(0))
    own = [
        scheduler.scale_model_input(scheduler.add_noise(z0[i : i + 1], noise[i : i + 1], t.view(1)), t)
        for i, t in enumerate(torch.tensor(times))
    ]
    return z0, noise, torch.cat(own)


@pytest.mark.parametrize("name", PLAIN)
def test_alphas_changed_in_place_count(name):
    scheduler = made(name)
    zero_terminal(scheduler)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    z0, noise, wanted = noised(scheduler)
    torch.testing.assert_close(schedule.add_noise(z0, noise, TIMES), wanted)
    assert torch.equal(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod)
    assert changed_in_place(scheduler).keys() == {"alphas_cumprod"}
    # The schedule keeps what it has read.
    scheduler.alphas_cumprod.fill_(0.5)
    assert not (schedule.alphas_cumprod == 0.5).any()


@pytest.mark.parametrize("change", ["betas", "register_to_config", "trained_betas", "subclass", "shifted"])
def test_what_a_scheduler_noises_by_counts_and_not_what_its_config_says(change):
    scheduler = made("DDIM")
    if change == "betas":
        # Nothing reads them once ᾱ is made.
        scheduler.betas = scheduler.betas * 0.5
    elif change == "register_to_config":
        scheduler.register_to_config(beta_end=0.03, rescale_betas_zero_snr=True)
    elif change == "trained_betas":
        scheduler.register_to_config(trained_betas=[0.01] * 1000)
    elif change == "subclass":

        class DDIMScheduler(diffusers.DDIMScheduler):
            def __init__(self, num_train_timesteps=1000, beta_start=0.1, beta_end=0.2):
                super().__init__(num_train_timesteps, beta_start, beta_end)
                zero_terminal(self)

        scheduler = DDIMScheduler(1000, 0.0001, 0.02)
    else:
        scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", snr_shift_scale=3.0)
    z0, noise, wanted = noised(scheduler)
    torch.testing.assert_close(NoiseSchedule.from_scheduler(scheduler).add_noise(z0, noise, TIMES), wanted)
    # As new the scheduler is the same.
    torch.testing.assert_close(noised(fresh_scheduler(scheduler))[2], wanted, rtol=0, atol=0)


def test_betas_of_a_kind_that_is_not_known_are_read_from_the_scheduler():
    scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    assert torch.equal(NoiseSchedule.from_scheduler(scheduler).alphas_cumprod.float(), scheduler.alphas_cumprod)


@pytest.mark.parametrize("name", WITH_SIGMAS)
def test_sigmas_that_alphas_do_not_give_are_refused_until_timesteps_are_set(name):
    for change in (zero_terminal, lambda scheduler: setattr(scheduler, "sigmas", scheduler.sigmas * 0.5)):
        scheduler = made(name)
        change(scheduler)
        with pytest.raises(ValueError, match=r"changed in place, and its sigmas are not those of its alphas_cumprod"):
            NoiseSchedule.from_scheduler(scheduler)
    scheduler = made(name)
    # Without a σ that is infinite, which no set_timesteps of these takes.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.5
    scheduler.set_timesteps(10)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    whole = next(t for t in scheduler.timesteps.flip(0).tolist() if float(t).is_integer() and t)
    z0, noise, wanted = noised(scheduler, [int(whole)])
    torch.testing.assert_close(schedule.add_noise(z0, noise, int(whole)), wanted, rtol=1e-4, atol=1e-4)
    # As new it agrees with itself, and so can be given on.
    again = NoiseSchedule.from_scheduler(fresh_scheduler(scheduler))
    assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)


def test_sigmas_changed_with_their_alphas_are_the_schedulers_own():
    scheduler = made("EulerDiscrete")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.5
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().flip(0)
    scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)])
    z0, noise, wanted = noised(scheduler, [900])
    got = NoiseSchedule.from_scheduler(scheduler).add_noise(z0, noise, 900)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(fresh_scheduler(scheduler).sigmas, scheduler.sigmas)


class Offset(diffusers.DDIMScheduler):
    def add_noise(self, original_samples, noise, timesteps):
        return super().add_noise(original_samples, noise + 0.1, timesteps)


class Logged(diffusers.DDIMScheduler):
    def add_noise(self, original_samples, noise, timesteps):
        return super().add_noise(original_samples, noise, timesteps)


def scaled(self, sample, timestep=None):
    return sample * 1.01


@functools.wraps(diffusers.DDIMScheduler.add_noise)
def disguised(self, original_samples, noise, timesteps):
    return original_samples


def test_noise_by_another_rule_is_refused(monkeypatch):
    assert NoiseSchedule.from_scheduler(Logged(**BETAS)).num_train_timesteps == 1000
    with pytest.raises(ValueError, match=r"the Offset's add_noise is its own .* and does not give"):
        NoiseSchedule.from_scheduler(Offset(**BETAS))
    stock = type("DDIMScheduler", (diffusers.DDIMScheduler,), {"scale_model_input": scaled})
    with pytest.raises(ValueError, match="the DDIMScheduler's scale_model_input is its own"):
        NoiseSchedule.from_scheduler(stock(**BETAS))
    monkeypatch.setattr(diffusers.DDIMScheduler, "add_noise", disguised)
    with pytest.raises(ValueError, match=r"add_noise is its own \('tests.diffusion.test_schedulers'\)"):
        NoiseSchedule.from_scheduler(made("DDIM"))


@pytest.mark.parametrize("name", ["add_noise", "step", "scale_model_input"])
def test_a_method_replaced_on_the_object_is_refused(name):
    scheduler = made("DDIM")
    setattr(scheduler, name, getattr(scheduler, name))
    for call in (NoiseSchedule.from_scheduler, fresh_scheduler, lambda each: scheduler_timesteps(each, 5)):
        with pytest.raises(ValueError, match=f"scheduler: {name} was replaced on the DDIMScheduler itself"):
            call(scheduler)


def test_an_attribute_that_the_scheduler_never_reads_is_refused():
    scheduler = made("DDIM")
    scheduler.prediction_type = "v_prediction"
    with pytest.raises(ValueError, match=r"prediction_type = 'v_prediction' was set on the DDIMScheduler, which reads"):
        NoiseSchedule.from_scheduler(scheduler)
    scheduler = made("DDIM")
    scheduler.register_to_config(prediction_type="v_prediction")
    assert NoiseSchedule.from_scheduler(scheduler).prediction_type == "v_prediction"
    scheduler.alphas_cumprod = scheduler.alphas_cumprod[::2]
    with pytest.raises(ValueError, match="alphas_cumprod has 500 entries, expected 1000 by its config"):
        NoiseSchedule.from_scheduler(scheduler)


def stepped(scheduler):
    """The scheduler's own walk over a network that halves its input, as a stock pipeline makes it."""
    scheduler.set_timesteps(6)
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    state = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = 0.5 * scheduler.scale_model_input(state, t)
        state = scheduler.step(output, t, state, return_dict=False)[0]
    return z, state


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("DDIM", {"final_alpha_cumprod": torch.tensor(0.9993)}),
        ("PNDM", {"final_alpha_cumprod": torch.tensor(0.7)}),
        ("DDIM", {"init_noise_sigma": 0.8}),
        ("EulerDiscrete", {"alphas_cumprod": tiny_scheduler("sd21").alphas_cumprod ** 1.2}),
    ],
)
def test_samplers_step_with_the_schedulers_own_numbers(name, change):
    scheduler = made(name, **({"clip_sample": False} if name == "DDIM" else {}))
    stock = made(name, **({"clip_sample": False} if name == "DDIM" else {}))
    scheduler.set_timesteps(6)
    for key, value in change.items():
        setattr(scheduler, key, value)
    scheduler.set_timesteps(6)
    before = dict(vars(scheduler))
    got = [
        sample(given, lambda x, t: 0.5 * x, stepped(stock)[0], steps=6)
        for given in (scheduler, fresh_scheduler(scheduler))
    ]
    assert vars(scheduler).keys() == before.keys()
    assert all(vars(scheduler)[key] is value for key, value in before.items())
    (_, unchanged), (_, wanted) = stepped(stock), stepped(scheduler)
    for each in got:
        torch.testing.assert_close(each, wanted, rtol=1e-5, atol=1e-5)
    assert (unchanged - wanted).abs().max() > 1e-3


def test_a_class_of_ones_own_with_a_stock_name_steps_itself():
    class DDIMScheduler(diffusers.DDIMScheduler):
        def step(self, *args, **kwargs):
            return (7 * torch.ones_like(super().step(*args, **kwargs)[0]),)

        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.timesteps = self.timesteps + 3

    pipe = tiny_pipeline("sd15")
    pipe.scheduler = DDIMScheduler(**BETAS)
    model = dsd.from_pipeline(pipe)
    *_, (_, last) = scheduler_steps(model.new_scheduler(), lambda x, t: x, torch.zeros(1, 4, 2, 2), 5)
    assert torch.equal(last, torch.full_like(last, 7.0))
    assert img2img_timestep(model.new_scheduler(), 500) == 502
    assert type(model.to_pipeline().scheduler) is DDIMScheduler
    assert scheduler_settings(model)["_class_name"].endswith("<locals>.DDIMScheduler")


class Loose(diffusers.DDIMScheduler):
    """Takes whatever DDIM does, so that its own arguments name nothing of its config."""

    def __init__(self, **options):
        super().__init__(**options)


class Closed(diffusers.DDIMScheduler):
    """Takes what its config does not hold."""

    def __init__(self, needed, **options):
        super().__init__(**options)


@pytest.mark.parametrize("make", [Loose, lambda **options: Closed(None, **options)])
def test_classes_that_are_not_made_from_their_config_keep_it(make):
    config = {**BETAS, "num_train_timesteps": 500, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    scheduler, wanted = make(**config), diffusers.DDIMScheduler(**config)
    schedule, exact = NoiseSchedule.from_scheduler(scheduler), NoiseSchedule.from_scheduler(wanted)
    assert torch.equal(schedule.alphas_cumprod, exact.alphas_cumprod)
    fresh = fresh_scheduler(scheduler)
    assert type(fresh) is type(scheduler)
    assert {**fresh.config} == {**scheduler.config}
    assert scheduler_timesteps(scheduler, 5) == scheduler_timesteps(wanted, 5) == [499, 399, 299, 199, 99]


def test_a_models_schedulers_are_as_its_own_and_fresh():
    pipe = tiny_pipeline("sd15")
    zero_terminal(pipe.scheduler)
    pipe.scheduler.final_alpha_cumprod = torch.tensor(0.9)
    plain = scheduler_settings(dsd.from_pipeline(tiny_pipeline("sd15")))
    pipe.scheduler.set_timesteps(5)
    stepped(pipe.scheduler)
    model = dsd.from_pipeline(pipe)
    for scheduler in (model.new_scheduler(), model.to_pipeline().scheduler):
        assert scheduler is not pipe.scheduler
        assert scheduler.num_inference_steps is None
        assert scheduler.ets == []
        assert torch.equal(scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
        assert scheduler.final_alpha_cumprod == 0.9
    again = dsd.from_pipeline(model.to_pipeline())
    assert torch.equal(again.schedule.alphas_cumprod, model.schedule.alphas_cumprod)
    # The model has what the scheduler held when it was made, and a folder of results knows.
    pipe.scheduler.final_alpha_cumprod = torch.tensor(0.1)
    assert model.new_scheduler().final_alpha_cumprod == 0.9
    settings = scheduler_settings(model)
    assert settings.pop("changed_in_place").keys() == {"alphas_cumprod", "final_alpha_cumprod"}
    assert settings == plain


def test_every_stock_scheduler_as_new_is_what_its_config_makes():
    """The names that walks write to are complete, and no number of a stock one counts as changed."""
    seen = 0
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if not inspect.isclass(kind) or "beta_schedule" not in inspect.signature(kind.__init__).parameters:
            continue
        with warnings.catch_warnings(action="ignore"):
            config = {"beta_schedule": "squaredcos_cap_v2" if name == "UnCLIPScheduler" else "linear"}
            scheduler, new = (kind(**config, num_train_timesteps=100) for _ in range(2))
            if not hasattr(scheduler, "alphas_cumprod"):
                continue
            exact = NoiseSchedule.from_scheduler(scheduler).alphas_cumprod
            scheduler.set_timesteps(4)
            state = torch.ones(1, 4, 2, 2)
            for t in scheduler.timesteps[:3]:
                # Some take more than the usual three arguments.
                with contextlib.suppress(TypeError):
                    scheduler.step(state, t, scheduler.scale_model_input(state, t))
            assert torch.equal(NoiseSchedule.from_scheduler(scheduler).alphas_cumprod, exact), name
        assert not changed_in_place(scheduler), name
        fresh = vars(fresh_scheduler(scheduler))
        # Sigmas that a class makes of nothing are NaN.
        left = [
            key
            for key in fresh
            if isinstance(fresh[key], torch.Tensor) and isinstance(vars(new).get(key), torch.Tensor)
        ]
        for key in left:
            torch.testing.assert_close(fresh[key], vars(new)[key], rtol=0, atol=0, equal_nan=True, msg=f"{name}.{key}")
        # A solver of its own; DPMSolverSinglestep writes to its config.
        rest = {key: value for key, value in fresh.items() if key not in left and not callable(value)}
        assert {key for key, value in rest.items() if repr(vars(new).get(key)) != repr(value)} <= {
            "solver_p",
            "_internal_dict",
        }, name
        seen += 1
    assert seen > 15
