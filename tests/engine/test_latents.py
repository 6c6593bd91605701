"""Noised latents, against the schedule's own formula row by row."""

import pytest
import torch

from dsd_fast.diffusion import NoiseSchedule, noise
from dsd_fast.engine import Noised, draw_noise, noised
from dsd_fast.unet import Output
from tests.tiny import tiny_scheduler

TIMES = [0, 261, 999]
SHAPE = (4, 6, 5)


@pytest.fixture(params=["epsilon", "v_prediction"])
def schedule(request):
    return NoiseSchedule.from_scheduler(tiny_scheduler("sd15", request.param))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_draws_of_seeds_are_those_of_each_seed():
    drawn = draw_noise([3, 5], 2, SHAPE)
    assert drawn.shape == (2, 2, *SHAPE)
    for row, seed in enumerate((3, 5)):
        for draw in range(2):
            assert torch.equal(drawn[row, draw], noise(seed, draw, SHAPE))


@pytest.mark.parametrize("own_noise", [False, True], ids=["shared noise", "own noise"])
@pytest.mark.parametrize("own_latents", [False, True], ids=["one latent", "a latent per timestep"])
def test_a_grid_is_image_by_image_and_timestep_by_timestep(schedule, own_noise, own_latents):
    clean = random(2, *([3] if own_latents else []), *SHAPE)
    epsilon = random(2 if own_noise else 1, 3, *SHAPE, seed=1)
    grid = Noised.grid(schedule, clean, epsilon, TIMES)
    assert grid.timesteps.tolist() == TIMES * 2
    for image in range(2):
        for step, t in enumerate(TIMES):
            row = 3 * image + step
            own = epsilon[image if own_noise else 0, step]
            latent = clean[image, step] if own_latents else clean[image]
            assert torch.equal(grid.noise[row], own)
            want = schedule.add_noise(latent[None], own, t)[0]
            # float64, one sum of two products.
            torch.testing.assert_close(grid.latents[row], want, rtol=1e-14, atol=1e-14)


def test_timestep_zero_may_be_the_clean_latent(schedule):
    clean, epsilon = random(2, *SHAPE), random(1, 1, 2, *SHAPE, seed=1)
    z = noised(schedule, clean, epsilon, [0, 300], clean_at_zero=True)
    assert z.shape == (2, 2, 2, *SHAPE)
    assert torch.equal(z[:, 0], clean[:, None].expand(-1, 2, -1, -1, -1))
    assert not torch.equal(noised(schedule, clean, epsilon, [0, 300])[:, 0], z[:, 0])


def test_a_right_prediction_has_no_error(schedule):
    clean, epsilon, times = random(3, *SHAPE), random(3, *SHAPE, seed=1), torch.tensor([10, 500, 900])
    rows = Noised.rows(schedule, clean, epsilon, times)
    right = epsilon if schedule.prediction_type == "epsilon" else schedule.to_v(epsilon, rows.latents, times)
    if schedule.prediction_type == "v_prediction":
        signal, sigma = (each[:, None, None, None] for each in schedule.coefficients(times))
        right = signal * epsilon - sigma * clean
    chosen = torch.tensor([2, 0])
    assert float(rows.error(Output(noise_pred=right[chosen]), chosen).max()) < 1e-12
    off = rows.error(Output(noise_pred=right[chosen] + 1), chosen)
    scale = 1 if schedule.prediction_type == "epsilon" else schedule.coefficients(times)[0][chosen]
    torch.testing.assert_close(off, scale * torch.full((2,), 120.0, dtype=torch.float64).sqrt())
