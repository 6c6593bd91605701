"""The suite `tokens`: its sides make the same gradients."""

import torch

from dsd_fast.bench.case import Context
from dsd_fast.bench.suites import tokens
from dsd_fast.bench.suites.shared import mini
from dsd_fast.class_tokens import TokenConfig


def test_the_sides_make_the_official_gradients(monkeypatch):
    monkeypatch.setattr(tokens, "CLASSES", 2)
    monkeypatch.setattr(tokens, "STEPS", 2)
    work = tokens.together(Context("cpu"))
    right = work.oracle()
    assert len(right) == tokens.CHECKED
    for side in work.sides:
        found = side.run()
        assert work.difference(found, right) <= work.tolerance
        # Of another class it is another one.
        first, second = right
        assert work.difference({first: found[second], second: found[first]}, right) > 0.1
    official, by_hand, ours = work.sides
    assert (official.batch, by_hand.batch, ours.batch) == (2, 10, 20)
    assert list(ours.against) == [official.name, by_hand.name]


def test_the_noise_losses_gradients_are_the_scripts():
    config = TokenConfig(loss="noise", images=3)
    update = tokens.ByNoise(mini(Context("cpu")).to_pipeline(), 2, config)
    right, found = update.official(update.walk), update.ours(update.gradients)
    # float32: predictions are off by some 1e-5, whose errors a difference with the noise makes ten times as much.
    assert tokens.largest_difference(found, right) <= 1e-4
    assert all(torch.isfinite(each).all() and each.norm() > 0 for each in right.values())
