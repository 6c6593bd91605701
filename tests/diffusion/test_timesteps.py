import diffusers
import numpy as np
import pytest
import torch

from dsd_fast.diffusion import img2img_timestep, official_timesteps, resolve_timesteps
from tests.tiny import tiny_scheduler


# Requested steps, timesteps used, first, second and last: computed from the official code.
@pytest.mark.parametrize(
    ("steps", "count", "first", "second", "last"),
    [
        (10, 10, 89, 189, 989),
        (30, 30, 32, 65, 989),
        (40, 40, 14, 39, 989),
        (50, 49, 29, 49, 989),
        (200, 196, 14, 19, 989),
        (1000, 980, 10, 11, 989),
    ],
)
def test_official_timesteps_table(steps, count, first, second, last):
    grid = official_timesteps(steps)
    assert (len(grid), grid[0], grid[1], grid[-1]) == (count, first, second, last)


@pytest.mark.parametrize("steps", [1, 3, 7, 50, 333, 999])
def test_official_timesteps_is_the_official_code(steps):
    # DSD's get_timesteps(num_inference_steps=50, strength=0.8) on the unspaced list 999 … 0.
    timesteps = np.arange(1000)[::-1]
    t_start = max(50 - min(int(50 * 0.8), 50), 0)
    t_end = 1000 - t_start
    expected = sorted(timesteps[np.arange(t_start, t_end, int(1000 / steps))].tolist())
    assert official_timesteps(steps) == expected


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "10", True])
def test_official_timesteps_refuses(steps):
    with pytest.raises(ValueError, match=r"^sampling_steps is .*expected"):
        official_timesteps(steps)


def test_official_timesteps_refuses_short_schedule():
    with pytest.raises(ValueError, match="num_train_timesteps is 20, expected more than 20"):
        official_timesteps(5, 20)


@pytest.mark.parametrize(
    ("family", "mapping"),
    [("sd15", {50: 51, 60: 61, 200: 201}), ("sd21", {50: 49, 60: 59}), ("sdxl", {50: 50, 60: 60})],
)
def test_img2img_timestep_table(family, mapping):
    scheduler = tiny_scheduler(family)
    for asked, used in mapping.items():
        assert img2img_timestep(scheduler, asked) == used
        config = {**scheduler.config, "_class_name": type(scheduler).__name__}
        assert img2img_timestep(config, asked) == used


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_img2img_timestep_is_the_pipelines(family):
    scheduler = tiny_scheduler(family)
    scheduler.set_timesteps(1000)
    pipeline = object.__new__(diffusers.StableDiffusionImg2ImgPipeline)
    object.__setattr__(pipeline, "scheduler", scheduler)
    for asked in (1, 29, 57, 114, 261, 555, 801, 999):
        expected = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, 1000, asked / 1000, "cpu")[0][0]
        assert img2img_timestep(scheduler, asked) == int(expected)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_img2img_timestep_zero_is_the_clean_latent(family):
    assert img2img_timestep(tiny_scheduler(family), 0) == 0


def test_img2img_timestep_leaves_the_scheduler():
    scheduler = tiny_scheduler("sd15")
    scheduler.set_timesteps(20)
    before = scheduler.timesteps.clone()
    img2img_timestep(scheduler, 50)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps == 20


def test_img2img_timestep_refuses():
    with pytest.raises(ValueError, match=r"^t is 1000, expected 0 to 999"):
        img2img_timestep(tiny_scheduler("sd15"), 1000)
    with pytest.raises(ValueError, match=r"^t is -1, expected 0 to 999"):
        img2img_timestep(tiny_scheduler("sd15"), -1)
    with pytest.raises(ValueError, match=r"^t is 0.5, expected an integer"):
        img2img_timestep(tiny_scheduler("sd15"), 0.5)
    with pytest.raises(ValueError, match="\"_class_name\": 'Nothing', expected the name of a diffusers scheduler"):
        img2img_timestep({"_class_name": "Nothing"}, 50)
    karras = diffusers.EulerDiscreteScheduler.from_config(tiny_scheduler("sd21").config, use_karras_sigmas=True)
    with pytest.raises(ValueError, match=r"maps t = 500 to .*, expected an integer from 0 to 999"):
        img2img_timestep(karras, 500)


def test_resolve_timesteps():
    assert resolve_timesteps(10) == official_timesteps(10)
    assert resolve_timesteps(np.int64(10)) == official_timesteps(10)
    assert resolve_timesteps([500, 1, 1]) == [500, 1, 1]
    assert resolve_timesteps(torch.tensor([0, 999])) == [0, 999]
    assert resolve_timesteps(np.array([3])) == [3]
    assert resolve_timesteps(range(2)) == [0, 1]
    assert resolve_timesteps([99], num_train_timesteps=100) == [99]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "timesteps is empty, expected at least one"),
        ([0, 1000], "timesteps holds 1000, expected 0 to 999"),
        ([-1], "timesteps holds -1, expected 0 to 999"),
        ([1.5], "timesteps is 1.5, expected an integer"),
        ("10", "timesteps is '10', expected a count or a sequence of integers"),
        (10.0, "timesteps is 10.0, expected a count or a sequence of integers"),
        (None, "timesteps is None, expected a count or a sequence of integers"),
        (0, "sampling_steps is 0, expected 1 to 1000"),
        (True, "expected an integer"),
    ],
)
def test_resolve_timesteps_refuses(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_timesteps(spec)
