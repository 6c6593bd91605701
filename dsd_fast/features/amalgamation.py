"""Amalgamation: one feature out of several of the same image, with weights that a task learns.

Meng et al., "Suppress Content Shift" (NeurIPS 2024, arXiv 2410.06719), appendix A.4: feature maps r_i of one image, got
with different techniques, and assigners f_j give weights w_i^j = f_j(r_i), whose sum over i is 1, and the feature
concat_j Σ_i w_i^j r_i.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsd_fast.jobs import read_tensors, write_tensors

__all__ = ["Amalgamated", "Amalgamation", "add_loss_terms", "loss_terms"]

# Width of an assigner, in the official code.
_HIDDEN = 128
_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
_KINDS, _WEIGHTS, _PROJECTIONS = ("conv", "pixel"), ("map", "channel"), ("interpolate", "conv")


class Amalgamated(NamedTuple):
    """
    Attributes:
        features: (B, n · width + A, h, w) for n assigners and attention features of A channels.
        weights: (B, n, b, 1, 1, 1) for b maps; of `weights` "channel" the fourth size is the width, and of `kind`
            "pixel" the last two are (h, w). The sum over b is 1.
    """

    features: Tensor
    weights: Tensor


class Amalgamation(nn.Module):
    """Mixes b feature maps of an image into one feature; trained with any task that reads it.

    An assigner f_j is one network for all maps, and a softmax over the maps makes their sum 1. Maps are first brought
    to one size (bilinear, no antialias) and one width. In the official code each map is the same layers under one more
    technique (prompt, ControlNet, LoRA, seed, timestep), concatenated over channels, so that widths agree;
    its label-scarce task stretches others along the channels, which is "interpolate" here.

    Args:
        channels: of each map in order, at least one; a (C, h, w) shape counts as its C.
        assigners: n.
        kind: "conv", weights for the whole map: conv 3×3 to 128 without bias, ReLU, batch norm, dropout, global mean,
            linear; or "pixel", weights for each position: linear to 128, ReLU, batch norm, dropout, linear. A batch
            of positions alone, as label-scarce segmentation trains on, is (positions, C, 1, 1).
        weights: "map", one weight for each map, as in the paper; or "channel", one for each channel of each map, as
            in the official code.
        width: channels of a mixed map; None is the largest of `channels`.
        projection: how maps of other widths get it: "interpolate", linearly along the channels, nothing learned; or
            "conv", a learned 1×1 convolution for each such map.
        dropout: share of an assigner's inner values left out in training.

    The parameters are drawn from torch's global generator, as those of its own layers are.

    Raises:
        ValueError: no maps, or a setting out of its range.
    """

    def __init__(
        self,
        channels: Sequence[int | Sequence[int]],
        assigners: int = 1,
        *,
        kind: str = "conv",
        weights: str = "map",
        width: int | None = None,
        projection: str = "interpolate",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.channels = tuple(each if isinstance(each, int) else each[0] for each in channels)
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels: got {channels!r}, expected those of at least one map, each at least 1")
        if assigners < 1:
            raise ValueError(f"assigners: got {assigners}, expected at least 1")
        if width is not None and width < 1:
            raise ValueError(f"width: got {width}, expected at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}, expected 0 <= dropout < 1")
        for name, value, known in (
            ("kind", kind, _KINDS),
            ("weights", weights, _WEIGHTS),
            ("projection", projection, _PROJECTIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected {' or '.join(map(repr, known))}")
        self.kind, self.per, self.projection, self.dropout = kind, weights, projection, dropout
        self.width = max(self.channels) if width is None else width
        self.assigners = nn.ModuleList(self._assigner() for _ in range(assigners))
        self.projections = nn.ModuleDict(
            {
                str(i): nn.Conv2d(each, self.width, 1, **_PLAIN)
                for i, each in enumerate(self.channels)
                if projection == "conv" and each != self.width
            }
        )

    def _assigner(self) -> nn.Sequential:
        out = 1 if self.per == "map" else self.width
        inner = (nn.ReLU(), nn.BatchNorm2d(_HIDDEN, **_PLAIN), nn.Dropout(self.dropout))
        if self.kind == "pixel":
            # 1×1 convolutions are linear layers that leave positions where they are.
            return nn.Sequential(
                nn.Conv2d(self.width, _HIDDEN, 1, **_PLAIN), *inner, nn.Conv2d(_HIDDEN, out, 1, **_PLAIN)
            )
        return nn.Sequential(
            nn.Conv2d(self.width, _HIDDEN, 3, padding=1, bias=False, **_PLAIN),
            *inner,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(_HIDDEN, out, **_PLAIN),
            nn.Unflatten(1, (out, 1, 1)),
        )

    def forward(self, maps: Sequence[Tensor], attention: Tensor | None = None) -> Tensor:
        """The features of :meth:`amalgamate` alone, for use as a layer of a network."""
        return self.amalgamate(maps, attention).features

    def amalgamate(
        self, maps: Sequence[Tensor], attention: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Amalgamated:
        """Mixed features, and the weights that :func:`loss_terms` wants.

        Args:
            maps: b of them, (B, C_i, h_i, w_i) of any float type; computed in the type of the parameters.
            attention: (B, A, h, w) attention features: resized, put behind the others, and never mixed.
            size: (h, w) of the result; None is the largest height and the largest width of the maps.

        Raises:
            ValueError: maps or attention of other shapes than announced.
        """
        self._check(maps, attention)
        if size is None:
            size = (max(each.shape[-2] for each in maps), max(each.shape[-1] for each in maps))
        rows = torch.stack([self._fitted(i, each, size) for i, each in enumerate(maps)], 1)
        # Map by map: batch statistics are of one map, as in the official code.
        found = [torch.stack([assign(rows[:, i]) for i in range(len(maps))], 1) for assign in self.assigners]
        weights = torch.stack(found, 1).softmax(2)
        mixed = [(weights[:, j] * rows).sum(1) for j in range(len(self.assigners))]
        if attention is not None:
            mixed.append(_resized(attention.to(rows.dtype), size))
        return Amalgamated(torch.cat(mixed, 1), weights)

    def _check(self, maps: Sequence[Tensor], attention: Tensor | None) -> None:
        shapes = [tuple(each.shape) for each in maps]
        found = tuple(shape[1] if len(shape) == 4 else -1 for shape in shapes)
        if found != self.channels:
            raise ValueError(f"maps: got shapes {shapes}, expected (B, C, h, w) with C = {self.channels}")
        others = shapes if attention is None else [*shapes, tuple(attention.shape)]
        if len({shape[0] for shape in others}) != 1 or len(others[-1]) != 4:
            raise ValueError(f"maps, attention: got shapes {others}, expected (B, C, h, w) with one B")

    def _fitted(self, i: int, features: Tensor, size: tuple[int, int]) -> Tensor:
        """The map at the common size and width."""
        features = _resized(features.to(next(self.parameters()).dtype), size)
        if features.shape[1] == self.width:
            return features
        if self.projection == "conv":
            projected: Tensor = self.projections[str(i)](features)
            return projected
        rows = features.permute(0, 2, 3, 1).flatten(1, 2)
        stretched = F.interpolate(rows, size=self.width, mode="linear")
        return stretched.reshape(-1, *size, self.width).permute(0, 3, 1, 2)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes parameters and settings as a safetensors file, whole or not at all.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        config = {
            "channels": list(self.channels),
            "assigners": len(self.assigners),
            "kind": self.kind,
            "weights": self.per,
            "width": self.width,
            "projection": self.projection,
            "dropout": self.dropout,
        }
        about = {"kind": "amalgamation", "format": 1, "config": config}
        write_tensors(Path(file), self.state_dict(), about)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Self:
        """What :meth:`save` wrote, on the CPU and in evaluation mode.

        Raises:
            ValueError: the file is not there, or is none that :meth:`save` wrote.
        """
        from safetensors import SafetensorError

        try:
            tensors, about = read_tensors(Path(file))
        except FileNotFoundError:
            raise ValueError(f"file: {file} is missing, expected one that Amalgamation.save wrote") from None
        except SafetensorError as error:
            raise ValueError(f"file: {file} is no safetensors file: {error}") from error
        if (about.get("kind"), about.get("format")) != ("amalgamation", 1):
            raise ValueError(f"file: {file} is {json.dumps(about)}, expected one that Amalgamation.save wrote")
        try:
            # On no device: the types are the file's, and the caller's random numbers stay as they are.
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                own = cls(**about["config"])
            own.load_state_dict(tensors, assign=True)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"file: {file} was not written by Amalgamation.save: {error}") from error
        return own.eval()


def loss_terms(weights: Tensor, *, sparsity: float = 0.0, diversity: float = 0.0) -> Tensor:
    """−γ₁ Σ_j ‖w^j‖₂ − (γ₂/2) Σ_j Σ_{k≠j} ‖w^j − w^k‖₂: fewer maps for each assigner, other maps for each (A.4).

    Norms are over the maps, and their means over the batch and, where weights have them, channels and positions. The
    official code divides the first sum by n, has 0 in place of the second, and lets γ₁ walk randomly.

    Args:
        weights: (B, n, b, …) of :class:`Amalgamated`.
        sparsity: γ₁.
        diversity: γ₂.

    Returns:
        A scalar, differentiable; a norm of 0 has gradient 0.

    Raises:
        ValueError: weights of fewer dimensions.
    """
    if weights.ndim < 3:
        raise ValueError(f"weights: got shape {tuple(weights.shape)}, expected (B, n, b, …)")
    own: Tensor = torch.linalg.vector_norm(weights, dim=2)
    apart: Tensor = torch.linalg.vector_norm(weights[:, :, None] - weights[:, None], dim=3)
    return -sparsity * own.sum(1).mean() - diversity / 2 * apart.sum((1, 2)).mean()


def add_loss_terms(loss: Tensor, amalgamated: Amalgamated, *, sparsity: float = 0.0, diversity: float = 0.0) -> Tensor:
    """A task's loss with :func:`loss_terms` of the weights that its features were mixed with."""
    return loss + loss_terms(amalgamated.weights, sparsity=sparsity, diversity=diversity)


def _resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    if features.shape[-2:] == size:
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)
