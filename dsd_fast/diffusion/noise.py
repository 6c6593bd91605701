"""Noise that depends on (seed, draw) alone: the same numbers on every machine, for every batch and every worker."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SEEDS = 2**64
"""Seeds are below it."""

NOISES = ("dsd_fast", "diffusers")
"""What the noise of a row is drawn by, see :class:`RowNoise`."""

_WORD = 2**32
# Where the state of torch's CPU generator, MT19937, has its 624 words, each in eight bytes.
_WORDS = slice(24, 24 + 8 * 624)


def noise(seed: int, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one draw.

    The pair is mixed by numpy's SeedSequence, so that neighbouring seeds and draws give unrelated streams, and drawn by
    a CPU generator, whose numbers do not depend on the device. Seeds below 2**32 share 2**32 streams: of n of them some
    n² / 2**33 pairs have the same noise, 1 of 10^5 and 116 of 10^6. Wider ones have streams of their own.

    Args:
        seed: 0 ≤ seed < 2**64.
        draw: index of the draw under that seed, 0 ≤ draw < 2**32.
        shape: shape of the result, usually (C, h, w) of one latent.

    Returns:
        float32 CPU tensor of that shape.

    Raises:
        ValueError: seed, draw or a size in `shape` is not an integer in its range.
    """
    check_seed("seed", seed)
    if not _is_int(draw) or not 0 <= draw < _WORD:
        raise ValueError(f"draw is {draw!r}, expected an integer with 0 <= draw < 2**32")
    sizes = tuple(shape)
    if not all(_is_int(size) and size >= 0 for size in sizes):
        raise ValueError(f"shape is {sizes!r}, expected non-negative integers")
    generator = _set(torch.Generator(), int(seed), int(draw))
    return torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu")


def check_seed(name: str, seed: object) -> None:
    """Refuse what is no seed.

    Raises:
        ValueError: not an integer with 0 ≤ seed < 2**64, by ``name``.
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < SEEDS:
        raise ValueError(f"{name} is {seed!r}, expected an integer with 0 <= {name} < 2**64")


class RowNoise:
    """The noise of B rows that are sampled together, each of its own seed and by a CPU generator of its own.

    "dsd_fast": the start is draw 0 of a row's seed, what the scheduler draws at its step number s (from 0) is draw
    s + 1, see :func:`noise`; of k rows of one seed, row m has draws m and k · (s + 1) + m. "diffusers": one
    ``manual_seed(seed)`` a row, from which all is drawn one after another, as stock pipelines do; the same numbers,
    where the type is theirs.

    Args:
        seeds: B of them, 0 ≤ seed < 2**64.
        kind: one of :data:`NOISES`.
        dtype: that "diffusers" draws in, the model's, to which its numbers are rounded.
        together: k, rows side by side that have one seed.

    Attributes:
        held: the type that latents have between steps, that of "diffusers", as in stock pipelines; None: float32 at
            least.

    Raises:
        ValueError: a seed that is none, or another kind.
    """

    def __init__(
        self, seeds: Sequence[int], kind: str = "dsd_fast", dtype: torch.dtype = torch.float32, *, together: int = 1
    ) -> None:
        if kind not in NOISES:
            raise ValueError(f"noise: got {kind!r}, expected one of {', '.join(NOISES)}")
        for seed in seeds:
            check_seed("seed", seed)
        self._seeds, self._own, self._together = [int(seed) for seed in seeds], kind == "dsd_fast", together
        self.held = None if self._own else dtype
        self._generators = [torch.Generator() for _ in seeds]
        for generator, seed in zip(self._generators, self._seeds, strict=True):
            generator.manual_seed(seed)

    def __len__(self) -> int:
        return len(self._seeds)

    @property
    def from_posterior(self) -> list[torch.Generator] | None:
        """The rows' generators where stock pipelines first draw a source image's latents from them; None: its mean."""
        return None if self._own else self._generators

    def start(self, shape: Sequence[int]) -> Tensor:
        """Draw what rows start from, (B, \\*shape) on the CPU."""
        dtype = self.held or torch.float32
        return torch.stack(
            [torch.randn(tuple(shape), generator=each, dtype=dtype, device="cpu") for each in self._at(0)]
        )

    def step(self, number: int) -> list[torch.Generator]:
        """Give the rows' generators as a scheduler's step of that number, from 0, has to find them."""
        return self._at(number + 1)

    def _at(self, turn: int) -> list[torch.Generator]:
        if self._own:
            for row, (generator, seed) in enumerate(zip(self._generators, self._seeds, strict=True)):
                _set(generator, seed, turn * self._together + row % self._together)
        return self._generators


def _set(generator: torch.Generator, seed: int, draw: int) -> torch.Generator:
    """Set a CPU generator to the stream of a pair."""
    if seed < _WORD:
        state = np.random.SeedSequence([seed, draw]).generate_state(1, np.uint64)[0]
        return generator.manual_seed(int(state >> np.uint64(1)))
    # Of a number the generator takes 32 bits, so that among as many seeds as a large job has some would be one.
    # SeedSequence cuts integers into words of 32 bits; the draw is the fifth here, which no narrow pair has.
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(draw,))).random_raw(312).view(np.uint32)
    whole = generator.manual_seed(0).get_state()
    whole[_WORDS] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
    return generator.set_state(whole)


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
