import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from dsd_fast.diffusion import RowNoise, noise

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
    # Wider seeds have the words of others: (2**32 + 1, 0) those of (1, 1).
    pairs += [(s, d) for s in (2**32, 2**32 + 1, 2**63, 2**64 - 1) for d in (0, 1)]
    draws = torch.stack([noise(s, d, SHAPE).flatten() for s, d in pairs]).double()
    n = draws.shape[1]
    gram = draws @ draws.T / n
    # Correlations of independent normals have standard deviation 1/sqrt(n), variances sqrt(2/n): six of them.
    assert (gram - torch.eye(len(pairs))).abs().max() < 6 * (2 / n) ** 0.5
    assert draws.mean(1).abs().max() < 6 / n**0.5


@pytest.mark.parametrize(
    ("seed", "draw", "named", "limit"),
    [
        (-1, 0, "seed", 64),
        (0, -1, "draw", 32),
        (2**64, 0, "seed", 64),
        (0, 2**32, "draw", 32),
        (1.0, 0, "seed", 64),
        (True, 0, "seed", 64),
    ],
)
def test_noise_refuses(seed, draw, named, limit):
    with pytest.raises(ValueError, match=f"^{named} is .*expected an integer with 0 <= {named} < 2\\*\\*{limit}"):
        noise(seed, draw, SHAPE)


def test_noise_refuses_shape():
    with pytest.raises(ValueError, match=r"^shape is"):
        noise(0, 0, (4, -1))


def test_wide_seeds_are_no_other_pairs():
    # The words of (2**32 + 5, 0) are those of (5, 1), and a draw of its own behind them makes five.
    wide = [noise(2**32 + 5, draw, (4,)) for draw in range(2)]
    assert not torch.equal(wide[0], noise(5, 1, (4,)))
    assert not torch.equal(wide[0], wide[1])
    # Two of 2**17 seeds whose first 32 bits agree, of which alone manual_seed would make the same noise.
    first, second = 2**32 + 36379, 2**32 + 86718
    bits = [np.random.SeedSequence(seed, spawn_key=(0,)).generate_state(1)[0] for seed in (first, second)]
    assert bits[0] == bits[1]
    assert not torch.equal(noise(first, 0, (4,)), noise(second, 0, (4,)))


def test_a_wide_seeds_stream_is_that_of_its_words():
    (generator,) = RowNoise([2**32 + 5]).step(0)
    other = np.random.MT19937(0)
    words = np.random.PCG64(np.random.SeedSequence([5, 1, 0, 0, 1])).random_raw(312).astype("<u8").view("<u4")
    other.state = {**other.state, "state": {"key": words, "pos": 624}}
    # Of each word torch takes 24 bits.
    drawn = torch.rand(2000, generator=generator) * 2**24
    assert np.array_equal(drawn.numpy(), other.random_raw(2000) % 2**24)


def test_rows_draw_their_own_noise():
    seeds = [7, 2**64 - 1]
    rows = RowNoise(seeds)
    assert torch.equal(rows.start((4, 2)), torch.stack([noise(seed, 0, (4, 2)) for seed in seeds]))
    for step in (1, 0):
        drawn = torch.stack([torch.randn(4, 2, generator=each) for each in rows.step(step)])
        assert torch.equal(drawn, torch.stack([noise(seed, 1 + step, (4, 2)) for seed in seeds]))
    # Of one seed thrice, and of another, no draw comes twice.
    rows = RowNoise([7] * 3 + [8] * 3, together=3)
    steps = (torch.stack([torch.randn(9, generator=each) for each in rows.step(number)]) for number in (0, 1))
    drawn = torch.cat([rows.start((9,)), *steps])
    assert torch.equal(drawn[::6], torch.stack([noise(7, draw, (9,)) for draw in (0, 3, 6)]))
    assert len(drawn.unique(dim=0)) == 18
    assert rows.from_posterior is None
    assert rows.held is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_draw_what_a_generator_gives_a_stock_pipeline(dtype):
    seeds = [7, 2**64 - 1]
    rows = RowNoise(seeds, "diffusers", dtype)
    theirs = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    ways = (rows.start((4, 2)), torch.stack([torch.randn(4, 2, generator=each, dtype=dtype) for each in rows.step(5)]))
    for drawn in ways:
        expected = randn_tensor((2, 4, 2), generator=theirs, dtype=dtype)
        assert torch.equal(drawn, expected)
        assert drawn.dtype == dtype
    assert rows.held == dtype


def test_row_noise_refuses():
    with pytest.raises(ValueError, match="seed is -1, expected an integer"):
        RowNoise([0, -1])
    with pytest.raises(ValueError, match="noise: got 'other', expected one of dsd_fast, diffusers"):
        RowNoise([0], "other")
