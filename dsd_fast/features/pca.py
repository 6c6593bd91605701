"""Principal components of features over positions: fewer channels to keep, and pictures to look at."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dsd_fast.jobs import read_tensors, write_tensors
from dsd_fast.kernels.common.host import own_types
from dsd_fast.kernels.common.transfer import upload

__all__ = ["PCA", "Moments", "picture"]

# Values held in float64 at a time while fitting.
_CHUNK = 2**24
_NAMES = ("mean", "components", "explained_variance")
_RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, eq=False)
class PCA:
    """The directions along which the channels of a feature vary most over images and positions.

    Attributes:
        mean: (C,) float32.
        components: (k, C) float32, orthonormal rows, the one that varies most first. The loading of each that is
            largest in magnitude is positive, as in scikit-learn.
        explained_variance: (k,) float32, the variance along each, with n − 1 in the denominator.

    Raises:
        ValueError: shapes that do not belong together.
    """

    mean: Tensor
    components: Tensor
    explained_variance: Tensor

    def __post_init__(self) -> None:
        k, channels = self.components.shape if self.components.ndim == 2 else (-1, -1)
        found = tuple(tuple(getattr(self, name).shape) for name in _NAMES)
        if found != ((channels,), (k, channels), (k,)):
            raise ValueError(f"mean, components, explained_variance: got shapes {found}, expected (C,), (k, C), (k,)")

    @classmethod
    def fit(cls, batches: Tensor | Iterable[Tensor], components: int) -> PCA:
        """The exact components of all positions of all images, in one pass over them.

        It stays on the features' device.

        Args:
            batches: (…, C, h, w) of any float type, or an iterable of such; h and w may differ between batches.
            components: k, from 1 to C, and at most the number of positions.

        Raises:
            ValueError: nothing to fit, values that are not finite, batches of different C, or a k out of range.
        """
        moments = Moments()
        for batch in (batches,) if isinstance(batches, Tensor) else batches:
            moments.add(batch)
        return moments.pca(components)

    def transform(self, x: Tensor) -> Tensor:
        """Features along the components, less the mean.

        Args:
            x: (B, C, h, w), any strides and float type.

        Returns:
            (B, k, h, w) in the type of `x`, computed in float32 or more, channels-last in memory. Differentiable in
            `x`.

        Raises:
            ValueError: another number of dimensions or channels.
        """
        if x.ndim != 4:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, C, h, w)")
        _check(x, len(self.mean), "x")
        kind = torch.promote_types(x.dtype, torch.float32)
        mean, components = (upload(value, x.device, kind) for value in (self.mean, self.components))
        # Rows, and not a 1 × 1 convolution, which cuDNN may round to TF32.
        rows = x.permute(0, 2, 3, 1).to(kind) - mean
        with own_types(rows.device):
            return (rows @ components.T).to(x.dtype).permute(0, 3, 1, 2)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return type(self)(*(upload(getattr(self, name), torch.device(device)) for name in _NAMES))

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        write_tensors(Path(file), {name: getattr(self, name) for name in _NAMES}, {"kind": "pca", "format": 1})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Self:
        """What :meth:`save` wrote, on the CPU.

        Raises:
            ValueError: the file is not there, or is none that :meth:`save` wrote.
        """
        from safetensors import SafetensorError

        try:
            tensors, about = read_tensors(Path(file))
        except FileNotFoundError:
            raise ValueError(f"file: {file} is missing, expected one that PCA.save wrote") from None
        except SafetensorError as error:
            raise ValueError(f"file: {file} is no safetensors file: {error}") from error
        if about != {"kind": "pca", "format": 1} or tensors.keys() != set(_NAMES):
            raise ValueError(f"file: {file} holds {sorted(tensors)} ({about}), expected one that PCA.save wrote")
        return cls(*(tensors[name] for name in _NAMES))


class Moments:
    """Mean and covariance of channels over positions, merged batch by batch in float64, and their components.

    Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance": no feature is kept, and the result
    depends on the size of the batches by rounding alone.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def add(self, batch: Tensor) -> None:
        """Takes features (…, C, h, w) of any float type into account.

        Raises:
            ValueError: another number of channels than before.
        """
        _check(batch, None if self._mean is None else len(self._mean), "batches")
        images = batch.detach().reshape(-1, *batch.shape[-3:])
        for part in torch.split(images, max(1, _CHUNK // max(1, images[:1].numel()))):
            self._merge(part.to(torch.float64).movedim(1, -1).flatten(0, -2))

    def pca(self, components: int) -> PCA:
        """The components along which what was added varies most.

        Raises:
            ValueError: fewer than two positions, values that are not finite, or a k out of range.
        """
        if components < 1:
            raise ValueError(f"components: got {components}, expected at least 1")
        mean, scatter, count = self._mean, self._scatter, self._count
        if mean is None or scatter is None or count < 2:
            raise ValueError(f"batches: got {count} positions, expected at least 2")
        if not scatter.isfinite().all():
            raise ValueError("batches: some values are not finite")
        if components > min(len(mean), count):
            raise ValueError(
                f"components: got {components}, expected at most {min(len(mean), count)}: "
                f"there are {len(mean)} channels and {count} positions"
            )
        # Ascending; rounding can make an eigenvalue of 0 negative.
        values, vectors = torch.linalg.eigh(scatter / (count - 1))
        chosen = vectors[:, -components:].flip(1).T
        largest = chosen.gather(1, chosen.abs().argmax(1, keepdim=True))
        chosen = torch.where(largest < 0, -chosen, chosen)
        variance = values[-components:].flip(0).clamp_min(0)
        return PCA(mean.float(), chosen.float().contiguous(), variance.float())

    def _merge(self, rows: Tensor) -> None:
        if not len(rows):
            return
        own = rows.mean(0)
        rows = rows - own
        scatter = rows.T @ rows
        if self._mean is None or self._scatter is None:
            self._count, self._mean, self._scatter = len(rows), own, scatter
            return
        step = own.to(self._mean.device) - self._mean
        total = self._count + len(rows)
        between = torch.outer(step, step) * (self._count * len(rows) / total)
        self._scatter += scatter.to(self._mean.device) + between
        self._mean += step * (len(rows) / total)
        self._count = total


def picture(
    features: Tensor,
    *,
    pca: PCA | None = None,
    size: tuple[int, int] | None = None,
    resample: str = "nearest",
    quantiles: tuple[float, float] = (0.01, 0.99),
) -> NDArray[np.uint8]:
    """The first three principal components as red, green and blue: positions of like features get like colours.

    Each component is stretched from one quantile of its values to another, over all images given, and cut off there;
    one that does not vary is mid-grey. One PCA over all images, so that their colours may be compared.

    Args:
        features: (C, h, w), or (N, C, h, w) for N images; C ≥ 3.
        pca: at least three components fitted to more images than these; None fits these.
        size: (height, width) of the pictures; None leaves them (h, w).
        resample: "nearest" or "bicubic", how they are enlarged.
        quantiles: 0 ≤ low < high ≤ 1; (0, 1) is plain min-max.

    Returns:
        (H, W, 3) uint8, or (N, H, W, 3) for (N, C, h, w).

    Raises:
        ValueError: other shapes, fewer than three channels, positions or components, values that are not finite, or
            an unknown setting.
    """
    if features.ndim not in (3, 4):
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected (C, h, w) or (N, C, h, w)")
    if resample not in _RESAMPLING:
        raise ValueError(f"resample: got {resample!r}, expected {' or '.join(map(repr, _RESAMPLING))}")
    low, high = quantiles
    if not 0 <= low < high <= 1:
        raise ValueError(f"quantiles: got {quantiles}, expected 0 <= low < high <= 1")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size: got {size}, expected (height, width), each at least 1")
    images = features.detach().reshape(-1, *features.shape[-3:])
    pca = PCA.fit(images, 3) if pca is None else pca
    if len(pca.components) < 3:
        raise ValueError(f"pca: got {len(pca.components)} components, expected at least 3")
    found = pca.transform(images.to(torch.promote_types(images.dtype, torch.float32)))[:, :3]
    values = found.permute(0, 2, 3, 1).double().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError("features: some values are not finite")
    least, most = np.quantile(values.reshape(-1, 3), (low, high), axis=0)
    span = most - least
    # Float32 rounding is no variation.
    varies = span > 1e-6 * span.max()
    scaled = np.where(varies, (values - least) / np.where(varies, span, 1), 0.5)
    shown = np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)
    if size is not None:
        way = _RESAMPLING[resample]
        shown = np.stack([np.asarray(Image.fromarray(each).resize((size[1], size[0]), way)) for each in shown])
    return np.asarray(shown.reshape(*features.shape[:-3], *shown.shape[1:]))


def _check(features: Tensor, channels: int | None, name: str) -> None:
    """Refuses what has no channels and positions, or not so many channels."""
    if not isinstance(features, Tensor) or features.ndim < 3 or not features.is_floating_point():
        got = (tuple(features.shape), features.dtype) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{name}: got {got}, expected (…, C, h, w) of a float type")
    if channels is not None and features.shape[-3] != channels:
        raise ValueError(f"{name}: got {features.shape[-3]} channels, expected {channels}")
