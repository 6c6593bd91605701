"""How near generated images are to real ones, to their texts and to their classes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from dsd_fast.kernels.common.host import ordinary
from dsd_fast.metrics.intervals import wilson

__all__ = ["clip_score", "frechet_distance", "guide_accuracy", "kernel_distance"]


class _Given(nn.Module):
    """Features in the place of a network that makes them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: ArrayLike, generated: ArrayLike) -> float:
    """The Fréchet distance of the Gaussians with the means and covariances of two sets of features, by torchmetrics.

    Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium". It is the
    FID of Inception's features alone, whose published weights are a pickle, which this package does not load: who
    trusts it gives the features that torch-fidelity makes. The embeddings of a model's CLIP give a distance of their
    own scale; distances of other features, or of other numbers of images, are not to be compared.

    Args:
        real, generated: (n, D) and (m, D), an image a row.

    Raises:
        ValueError: features of another shape, fewer than two, or no finite numbers.
        ImportError: torchmetrics is not there.
    """
    sets = _features(real, generated)
    with ordinary():
        metric = _torchmetrics("fid").FrechetInceptionDistance(feature=_Given(sets[0].shape[1]))
        for is_real, features in zip((True, False), sets, strict=True):
            metric.update(features, real=is_real)
        # Of what rounding takes below zero.
        return max(0.0, float(metric.compute()))


def kernel_distance(
    real: ArrayLike, generated: ArrayLike, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The squared maximum mean discrepancy of two sets of features under the kernel (x·y / D + 1)³, by torchmetrics.

    Bińkowski et al. 2018, "Demystifying MMD GANs", which calls it KID with Inception's features; see
    :func:`frechet_distance` about them.

    Args:
        real, generated: (n, D) and (m, D), an image a row.
        subsets: drawn from each set.
        subset_size: features in each; where a set has fewer, as many as it has.
        seed: of the draws.

    Returns:
        Mean and standard deviation over the subsets; the mean may be below 0 where the sets are alike.

    Raises:
        ValueError: features of another shape, fewer than two, or no finite numbers; no subsets.
        ImportError: torchmetrics is not there.
    """
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets, subset_size: got {subsets} and {subset_size}, expected at least 1 and 2")
    sets = _features(real, generated)
    size = min(subset_size, *map(len, sets))
    with ordinary(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # It says that it holds all features, which the caller does too.
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance`")
        torch.manual_seed(seed)
        metric = _torchmetrics("kid").KernelInceptionDistance(
            feature=_Given(sets[0].shape[1]), subsets=subsets, subset_size=size
        )
        for is_real, features in zip((True, False), sets, strict=True):
            metric.update(features, real=is_real)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def clip_score(images: ArrayLike, texts: ArrayLike) -> float:
    """The mean of 100 times the cosine of each image's CLIP embedding with its text's, at least 0.

    As torchmetrics' CLIPScore, which of Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image
    Captioning", leaves the factor 2.5 out.

    Args:
        images, texts: (n, E) each, of any length.

    Raises:
        ValueError: other shapes, no finite numbers, or an embedding of zeros.
    """
    pair = [_matrix(name, value) for name, value in (("images", images), ("texts", texts))]
    if pair[0].shape != pair[1].shape or not len(pair[0]):
        raise ValueError(f"images, texts: got {pair[0].shape} and {pair[1].shape}, expected (n, E) twice, n ≥ 1")
    norms = [np.linalg.norm(each, axis=1) for each in pair]
    if not min(float(each.min()) for each in norms) > 0:
        raise ValueError("images, texts: an embedding is zero, which has no direction")
    cosines = (pair[0] * pair[1]).sum(1) / (norms[0] * norms[1])
    return max(0.0, 100 * float(cosines.mean()))


def guide_accuracy(scores: ArrayLike, wanted: ArrayLike) -> tuple[float, tuple[float, float]]:
    """The share of images of which a classifier's first class is the one that they were made for.

    Args:
        scores: (n, K), the classifier's logits or probabilities.
        wanted: (n,), the classes, 0 to K - 1.

    Returns:
        The share, and its Wilson score interval of 95 %.

    Raises:
        ValueError: other shapes or classes, or no finite numbers.
    """
    found, classes = _matrix("scores", scores), np.asarray(wanted)
    if classes.shape != found.shape[:1] or not len(found):
        raise ValueError(f"wanted: got {classes.shape} for scores of {found.shape}, expected a class for each image")
    if not np.issubdtype(classes.dtype, np.integer) or classes.min() < 0 or classes.max() >= found.shape[1]:
        raise ValueError(f"wanted: got {classes.tolist()[:8]} …, expected classes from 0 to {found.shape[1] - 1}")
    right = int((found.argmax(1) == classes).sum())
    return right / len(found), wilson(right, len(found))


def _matrix(name: str, value: ArrayLike) -> NDArray[np.float64]:
    known = value.detach().to("cpu", torch.float64).numpy() if isinstance(value, torch.Tensor) else value
    matrix = np.ascontiguousarray(known, dtype=np.float64)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError(f"{name}: got an array of shape {matrix.shape}, expected a matrix of finite numbers")
    return matrix


def _features(real: ArrayLike, generated: ArrayLike) -> list[torch.Tensor]:
    sets = [_matrix(name, value) for name, value in (("real", real), ("generated", generated))]
    if sets[0].shape[1] != sets[1].shape[1] or min(map(len, sets)) < 2:
        raise ValueError(
            f"real, generated: got features of shape {sets[0].shape} and {sets[1].shape}, expected (n, D) and (m, D) "
            "with n, m ≥ 2"
        )
    return [torch.from_numpy(each) for each in sets]


def _torchmetrics(name: str) -> Any:
    try:
        from torchmetrics.image import fid, kid
    except ImportError as error:
        raise ImportError("distances of images need torchmetrics: pip install 'dsd-fast[metrics]'") from error
    return {"fid": fid, "kid": kid}[name]
