import numpy as np
import pytest
import torch

from dsd_fast.diffusion import noise

SHAPE = (4, 16, 16)


def test_noise_depends_on_seed_and_draw_alone():
    state = torch.get_rng_state()
    first = noise(7, 3, SHAPE)
    torch.randn(5)
    torch.manual_seed(99)
    np.random.seed(1)
    assert torch.equal(noise(7, 3, SHAPE), first)
    assert torch.equal(noise(np.int64(7), np.int32(3), torch.Size(SHAPE)), first)
    torch.set_rng_state(state)
    noise(0, 0, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_a_known_number():
    # SeedSequence and torch's CPU generator promise stable streams, so stored results stay comparable.
    seed = int(np.random.SeedSequence([0, 0]).generate_state(1, np.uint64)[0]) >> 1
    expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    result = noise(0, 0, SHAPE)
    assert torch.equal(result, expected)
    assert result.dtype == torch.float32
    assert result.device.type == "cpu"


def test_noise_of_neighbouring_pairs_is_unrelated():
    pairs = [(s, d) for s in range(4) for d in range(4)] + [(2**32 - 1, 0), (0, 2**32 - 1)]
    draws = torch.stack([noise(s, d, SHAPE).flatten() for s, d in pairs]).double()
    n = draws.shape[1]
    gram = draws @ draws.T / n
    # Correlations of independent normals have standard deviation 1/sqrt(n), variances sqrt(2/n): six of them.
    assert (gram - torch.eye(len(pairs))).abs().max() < 6 * (2 / n) ** 0.5
    assert draws.mean(1).abs().max() < 6 / n**0.5


@pytest.mark.parametrize(
    ("seed", "draw", "named"),
    [(-1, 0, "seed"), (0, -1, "draw"), (2**32, 0, "seed"), (0, 2**32, "draw"), (1.0, 0, "seed"), (True, 0, "seed")],
)
def test_noise_refuses(seed, draw, named):
    with pytest.raises(ValueError, match=f"^{named} is .*expected an integer with 0 <= {named} < 2\\*\\*32"):
        noise(seed, draw, SHAPE)


def test_noise_refuses_shape():
    with pytest.raises(ValueError, match=r"^shape is"):
        noise(0, 0, (4, -1))


def test_wide_seeds_would_collide():
    # Why the range ends at 2**32: the words of (2**32 + 5, 0) are those of (5, 1).
    def mix(seed, draw):
        return np.random.SeedSequence([seed, draw]).generate_state(1, np.uint64)[0]

    assert mix(2**32 + 5, 0) == mix(5, 1)
