"""What a step learns from, and how fast."""

from __future__ import annotations

import torch

from dsd_fast.training.loop import seed_of


def batch_of(count: int, size: int, step: int, seed: int) -> list[int]:
    """Give the numbers of a step's examples: all of them in an order of the epoch's, one epoch after the other.

    Args:
        count: of all examples.
        size: examples a step.
        step: counted from 0.
        seed: of the orders.
    """
    places = range(step * size, (step + 1) * size)
    orders = {
        epoch: torch.randperm(
            count, generator=torch.Generator().manual_seed(seed_of(seed, epoch, 0, 1)), device="cpu"
        ).tolist()
        for epoch in {place // count for place in places}
    }
    return [orders[place // count][place % count] for place in places]


def scheduled(rate: float, step: int, steps: int, warmup: int, *, falls: bool) -> float:
    """Give the learning rate at a step, counted from 0: it rises over ``warmup`` steps and stays, or falls.

    Args:
        falls: whether it falls to 0 in the second half of the steps.
    """
    if warmup:
        rate *= min(1.0, (step + 1) / warmup)
    return rate * min(1.0, 2 * (1 - step / steps)) if falls else rate
