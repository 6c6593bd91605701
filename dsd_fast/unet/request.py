"""What one run is asked for, and the bucket of sizes that it is rounded up to under a compiled runtime."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsd_fast.unet.checks import Residuals
from dsd_fast.unet.text import TextKV


@dataclass(frozen=True)
class Request:
    """The checked arguments of :meth:`Plan.run`, on the network's device.

    Attributes:
        rows: B.
        latents: (P, C, h, w), channels-last.
        times: (P,).
        text: M texts, or None.
        latent_index, text_index: (B,) int64, or None.
        time_ids: (P, 6), or None for a network that does not read image sizes.
        residuals: a ControlNet's, B rows.
        map_tokens: (B, n) int64.
        checkpoint: whether gradients are computed with the activations of one region at a time.
    """

    rows: int
    latents: Tensor
    times: Tensor
    text: TextKV | None
    latent_index: Tensor | None
    text_index: Tensor | None
    time_ids: Tensor | None
    residuals: Residuals | None
    map_tokens: Tensor | None
    checkpoint: bool = False

    def embedded(self) -> tuple[Tensor, torch.dtype, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """What the time embedding is made from, in the order of :func:`dsd_fast.unet.execution.embed`."""
        pooled = None if self.text is None else self.text.pooled
        return self.times, self.latents.dtype, self.time_ids, pooled, self.latent_index, self.text_index

    def padded(self) -> Request:
        """This request with P, M and B rounded up to their buckets.

        What is added repeats latent 0, text 0 and row 0, so that it is as harmless as they are.
        """
        count, rows = bucket(len(self.latents)), bucket(self.rows)
        text = None if self.text is None else self.text.padded(bucket(len(self.text)))
        return replace(
            self,
            rows=rows,
            latents=pad(self.latents, count),
            times=pad(self.times, count),
            text=text,
            latent_index=None if self.latent_index is None else pad(self.latent_index, rows),
            text_index=None if self.text_index is None else pad(self.text_index, rows),
            time_ids=None if self.time_ids is None else pad(self.time_ids, count),
            residuals=_map_residuals(self.residuals, lambda x: pad(x, rows)),
            map_tokens=None if self.map_tokens is None else pad(self.map_tokens, rows),
        )

    @property
    def key(self) -> Hashable:
        """Equal for requests of the same bucket: padded, their tensors have the same shapes and types."""
        tokens = self.map_tokens
        return (
            bucket(self.rows),
            bucket(len(self.latents)),
            self.latents.shape[1:],
            self.text_key,
            (self.latent_index is None, self.text_index is None),
            self.times.dtype,
            None if self.time_ids is None else self.time_ids.dtype,
            None if self.residuals is None else self.residuals[1].dtype,
            None if tokens is None else tokens.shape[1],
        )

    @property
    def text_key(self) -> Hashable:
        """Equal for requests whose texts, padded, have the same shapes."""
        return None if self.text is None else (bucket(len(self.text)), self.text.tokens, self.text.optional)

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient to any of the tensors is wanted."""
        texts = () if self.text is None else self.text.tensors()
        return any(x.requires_grad for x in (*self.tensors(), *texts))

    def tensors(self) -> Iterator[Tensor]:
        """All tensors save the texts', in a fixed order."""
        residuals = () if self.residuals is None else (*self.residuals[0], self.residuals[1])
        rest = (self.latent_index, self.text_index, self.time_ids, self.map_tokens)
        return (x for x in (self.latents, self.times, *rest, *residuals) if x is not None)

    def cloned(self) -> Request:
        """A copy that shares no memory with this one, save the texts'."""

        def clone(value: Tensor | None) -> Any:
            return None if value is None else value.clone()

        return replace(
            self,
            latents=clone(self.latents),
            times=clone(self.times),
            latent_index=clone(self.latent_index),
            text_index=clone(self.text_index),
            time_ids=clone(self.time_ids),
            residuals=_map_residuals(self.residuals, clone),
            map_tokens=clone(self.map_tokens),
        )


def bucket(count: int) -> int:
    """The size that ``count`` rows, latents or texts are computed at.

    Powers of two up to 16, where a GPU is far from busy and rows that nobody reads cost next to nothing; then four
    sizes an octave (20, 24, 28, 32, 40, …): less than a fifth of the rows is padding, and every doubling costs four
    compilations.
    """
    if count <= 1:
        return count
    octave = 1 << (count - 1).bit_length()
    step = octave // 8 if octave > 16 else octave
    return -(-count // step) * step


def full_bucket(count: int) -> int:
    """The largest size of a bucket that ``count`` rows fill."""
    octave = 1 << (count.bit_length() - 1)
    step = octave // 4 if octave >= 16 else octave
    return count // step * step


def pad(value: Tensor, count: int) -> Tensor:
    """``value`` with ``count`` rows, those added equal to the first."""
    missing = count - len(value)
    if not missing:
        return value
    # One by one, not expanded: an expanded image would lose the channels-last layout.
    return torch.cat([value, *[value[:1]] * missing])


def _map_residuals(value: Residuals | None, change: Callable[[Tensor], Tensor]) -> Residuals | None:
    if value is None:
        return None
    down, mid = value
    return [change(x) for x in down], change(mid)
