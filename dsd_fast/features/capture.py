"""From what the network answers to what is handed out: mean over draws, PCA, resizing, normalisation, type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsd_fast.features.attention import KEY, AttentionTap
from dsd_fast.features.config import FeatureConfig
from dsd_fast.features.pca import PCA
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.kernels.pack_features import pack_features
from dsd_fast.unet import Output, UNetProgram

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Exit:
    """How one feature leaves.

    Attributes:
        taken: (C, h, w) as the network answers it.
        given: (C', H, W) as it is handed out.
        mode: of :func:`pack_features`.
        normalize: whether each position is divided by its norm over channels.
        pca: or None.
    """

    taken: Shape
    given: Shape
    mode: str
    normalize: bool
    pca: PCA | None

    def pack(self, x: Tensor, out: Tensor, rows: Tensor) -> None:
        """``x`` (B, C, h, w) into the rows of ``out`` (R, C', H, W)."""
        if self.pca is not None:
            # Rounded once, as it is written.
            x = self.pca.transform(x.to(torch.promote_types(x.dtype, torch.float32)))
        pack_features(x, out, rows, mode=self.mode, normalize=self.normalize)


def exits(
    program: UNetProgram,
    config: FeatureConfig,
    layers: tuple[str, ...],
    attention: AttentionTap | None,
    size: tuple[int, int],
    tokens: int,
    pca: Mapping[str, PCA],
) -> dict[str, Exit]:
    """How each layer leaves, and the attention maps under their key.

    Args:
        size: (h, w) of the latents.
        tokens: T.

    Raises:
        ValueError: a PCA of a feature that is not asked for, or of other channels; whole attention maps that are to be
            changed on the way out.
    """
    steps, sizes = {step.name: step for step in program.steps}, program.sizes(*size)
    shapes: dict[str, Shape] = {}
    for name in layers:
        shape = steps[name].shape
        assert shape is not None
        channels, height, width = shape(sizes[steps[name].level], tokens)
        shapes[name] = (channels, height, width)
        changed = config.resize is not None or config.pool is not None or config.normalize or name in pca
        if name.endswith("-map") and changed:
            raise ValueError(f"layers: {name!r} has no picture's shape, so it cannot be resized, pooled or normalised")
    if attention is not None:
        shapes[KEY] = (attention.channels, *size)
    for name, given in pca.items():
        if name not in shapes:
            raise ValueError(f"pca: {name!r} is not extracted; what is: {', '.join(shapes)}")
        if len(given.mean) != shapes[name][0]:
            raise ValueError(f"pca: that of {name!r} has {len(given.mean)} channels, expected {shapes[name][0]}")
    return {name: _exit(name, config, shape, pca.get(name)) for name, shape in shapes.items()}


def _exit(name: str, config: FeatureConfig, shape: Shape, pca: PCA | None) -> Exit:
    channels, height, width = shape
    mode = "bilinear"
    if config.pool is not None:
        height, width, mode = 1, 1, "area" if config.pool == "mean" else "max"
    elif isinstance(config.resize, tuple):
        height, width = config.resize
    elif config.resize is not None and name != KEY:
        height, width, mode = max(1, height // config.resize), max(1, width // config.resize), "area"
    given = channels if pca is None else len(pca.components)
    return Exit(shape, (given, height, width), mode, config.normalize, pca)


class Capture:
    """Collects the rows of some images: row (image · S + timestep) · D + draw.

    Args:
        outgoing: what leaves, by name.
        attention: gathers the attention maps, if they are asked for.
        out: (R, C', H, W) for each name; rows of images, timesteps and, where draws are kept, draws.
        first: rows of ``out`` before those of these images.
        rows: how many rows of ``out`` are theirs.
        mean_of: draws that are averaged into one row; 1 where they are kept.
    """

    def __init__(
        self,
        outgoing: Mapping[str, Exit],
        attention: AttentionTap | None,
        out: Mapping[str, Tensor],
        first: int,
        rows: int,
        mean_of: int,
    ) -> None:
        self._exits, self._attention, self._out = outgoing, attention, out
        self._first, self._rows, self._mean_of = first, rows, mean_of
        self._sums: dict[str, Tensor] = {}

    def add(self, rows: Tensor, output: Output) -> None:
        """What the network answered for ``rows`` (b,) int64 on the CPU."""
        taken = dict(output.features)
        if self._attention is not None:
            taken[KEY] = self._attention.gather(output)
        draws = None if self._mean_of == 1 else self._draws(rows, next(iter(taken.values())).device)
        for name, value in taken.items():
            if draws is None:
                self._exits[name].pack(value, self._out[name], rows + self._first)
            else:
                self._sum(name, value, draws)

    def finish(self) -> None:
        """Hands out what had to wait for all draws."""
        every = torch.arange(self._first, self._first + self._rows, device="cpu")
        for name, total in self._sums.items():
            self._exits[name].pack(total / self._mean_of, self._out[name], every)

    def _draws(self, rows: Tensor, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Of each draw, which of the rows are its own and which sums they go to.

        Draw by draw: in each no sum occurs twice, so the order of additions is always the same.
        """
        parts = [torch.nonzero(rows % self._mean_of == draw).flatten() for draw in range(self._mean_of)]
        pairs = [(part, rows[part] // self._mean_of) for part in parts if len(part)]
        return [(upload(part, device), upload(where, device)) for part, where in pairs]

    def _sum(self, name: str, value: Tensor, draws: Sequence[tuple[Tensor, Tensor]]) -> None:
        if name not in self._sums:
            real = torch.promote_types(value.dtype, torch.float32)
            empty = torch.empty((self._rows, *value.shape[1:]), dtype=real, device=value.device)
            self._sums[name] = empty.contiguous(memory_format=torch.channels_last).zero_()
        total = self._sums[name]
        for part, where in draws:
            total[where] += value[part]
