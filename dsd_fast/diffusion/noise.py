"""Noise that depends on (seed, draw) alone: the same numbers on every machine, for every batch and every worker."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# SeedSequence cuts integers into 32-bit words and pads with zeros, so a wider seed could collide with another (seed,
# draw).
_LIMIT = 2**32


def noise(seed: int, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one draw.

    The pair is mixed by numpy's SeedSequence, so that neighbouring seeds and draws give unrelated streams, and drawn by
    a CPU generator, whose numbers do not depend on the device.

    Args:
        seed: 0 ≤ seed < 2**32.
        draw: index of the draw under that seed, 0 ≤ draw < 2**32.
        shape: shape of the result, usually (C, h, w) of one latent.

    Returns:
        float32 CPU tensor of that shape.

    Raises:
        ValueError: seed, draw or a size in `shape` is not an integer in its range.
    """
    for name, value in (("seed", seed), ("draw", draw)):
        if not _is_int(value) or not 0 <= value < _LIMIT:
            raise ValueError(f"{name} is {value!r}, expected an integer with 0 <= {name} < 2**32")
    sizes = tuple(shape)
    if not all(_is_int(size) and size >= 0 for size in sizes):
        raise ValueError(f"shape is {sizes!r}, expected non-negative integers")
    state = int(np.random.SeedSequence([int(seed), int(draw)]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.randn(sizes, generator=torch.Generator().manual_seed(state), dtype=torch.float32, device="cpu")


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
