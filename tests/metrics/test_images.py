"""Distances of sets of features against their definitions, and CLIPScore and accuracy against torchmetrics'."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsd_fast.metrics import clip_score, frechet_distance, guide_accuracy, kernel_distance, wilson

pytest.importorskip("torchmetrics")


def draws(count, width=4, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width))


def with_moments(count, mean, roots):
    """Features of exactly this mean and the covariance diag(roots²)."""
    x = draws(count, len(mean))
    x -= x.mean(0)
    whitened = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return whitened * roots + mean


def test_the_distance_of_two_gaussians():
    mean, roots = np.array([1.0, -2, 0, 3]), np.array([1.0, 2, 0.5, 3])
    other, others = np.array([0.0, 0, 1, 3]), np.array([2.0, 2, 0.25, 1])
    # Of diagonal covariances |μ − μ'|² + Σ (σ − σ')² (Dowson and Landau 1982).
    want = ((mean - other) ** 2).sum() + ((roots - others) ** 2).sum()
    real, generated = with_moments(50, mean, roots), with_moments(70, other, others)
    assert frechet_distance(real, generated) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(torch.from_numpy(real).float(), generated) == pytest.approx(want, rel=1e-5)
    assert frechet_distance(real, real[::-1]) == pytest.approx(0, abs=1e-6)


def discrepancy(x, y):
    """The unbiased estimate of its definition, pair by pair."""

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    def within(z):
        return np.mean([kernel(a, b) for a, b in itertools.permutations(z, 2)])

    return within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_the_discrepancy_of_two_sets():
    real, generated = draws(9), draws(9, seed=1) + 0.5
    mean, deviation = kernel_distance(real, generated, subsets=3)
    assert mean == pytest.approx(discrepancy(real, generated), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)
    # Equal sets have less than nothing between them, since no feature is compared with itself.
    assert kernel_distance(real, real, subsets=1)[0] == pytest.approx(discrepancy(real, real), rel=1e-9)
    assert discrepancy(real, real) < 0
    state = torch.random.get_rng_state()
    some = [kernel_distance(real, generated, subsets=5, subset_size=4, seed=seed) for seed in (3, 3, 4)]
    assert some[0] == some[1] != some[2]
    assert some[0][1] > 0
    assert torch.equal(torch.random.get_rng_state(), state)


class Clip:
    """What CLIPScore asks for, with tensors as it takes them; transformers 5 gives outputs with more in them."""

    config = SimpleNamespace()

    def __init__(self, images, texts):
        self.images, self.texts = images, texts

    def to(self, device):
        return self

    def get_image_features(self, pixels):
        return self.images

    def get_text_features(self, tokens, mask):
        return self.texts

    def processor(self, text=None, images=None, **options):
        nothing = torch.zeros(1, 1)
        return {"pixel_values": nothing, "input_ids": nothing, "attention_mask": nothing}


@pytest.mark.parametrize("sign", [1, -1])
def test_the_score_of_clip_is_torchmetrics_own(sign):
    from torchmetrics.multimodal import CLIPScore

    texts = torch.from_numpy(draws(6))
    images = sign * (texts + 0.5 * torch.from_numpy(draws(6, seed=1)))
    clip = Clip(images, texts)
    metric = CLIPScore(lambda: (clip, clip.processor))
    metric.update(list(torch.zeros(6, 3, 2, 2)), ["a"] * 6)
    assert clip_score(images, texts) == pytest.approx(float(metric.compute()), rel=1e-6)
    assert (clip_score(images, texts) > 0) == (sign > 0)


def test_the_accuracy_of_a_guide_is_torchmetrics_own():
    from torchmetrics.functional.classification import multiclass_accuracy

    scores, wanted = draws(40, 3), np.arange(40) % 3
    share, interval = guide_accuracy(scores, wanted)
    want = multiclass_accuracy(torch.from_numpy(scores), torch.from_numpy(wanted), 3, average="micro")
    assert share == pytest.approx(float(want))
    assert interval == wilson(round(40 * share), 40)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (lambda: frechet_distance(draws(3), draws(3, 5)), r"got features of shape \(3, 4\) and \(3, 5\)"),
        (lambda: frechet_distance(draws(1), draws(3)), "n, m ≥ 2"),
        (lambda: frechet_distance(draws(3), draws(3)[0]), r"generated: got an array of shape \(4,\)"),
        (lambda: kernel_distance(draws(3) * np.nan, draws(3)), "real: .*expected a matrix of finite numbers"),
        (lambda: kernel_distance(draws(3), draws(3), subsets=0), "subsets, subset_size: got 0 and 1000"),
        (lambda: clip_score(draws(3), draws(2)), r"images, texts: got \(3, 4\) and \(2, 4\)"),
        (lambda: clip_score(draws(3) * 0, draws(3)), "an embedding is zero"),
        (lambda: guide_accuracy(draws(3), [0, 1]), "wanted: got .*, expected a class for each image"),
        (lambda: guide_accuracy(draws(3), [0, 1, 4]), "wanted: got .*, expected classes from 0 to 3"),
        (lambda: guide_accuracy(draws(3), [0.0, 1, 2]), "wanted: got .*, expected classes from 0 to 3"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_features_is_refused(call, wrong):
    with pytest.raises(ValueError, match=wrong):
        call()
