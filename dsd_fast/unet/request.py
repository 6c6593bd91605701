"""What one call asks for, and the bucket of sizes that it is rounded up to under a compiled runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsd_fast.kernels.common.transfer import upload
from dsd_fast.unet import checks
from dsd_fast.unet.checks import Index, Residuals
from dsd_fast.unet.cut import Cut
from dsd_fast.unet.step import RowIndex
from dsd_fast.unet.text import TextKV

Change = Callable[[Tensor], Tensor]


class Request:
    """The arguments of :meth:`Plan.run`, checked: those of a run on the network's device, or all rows of a stream.

    Attributes:
        rows: B.
        latents: (P, C, h, w), channels-last for a run.
        sizes: image size at each level.
        times: (P,).
        text: M texts, of the cut's layers alone, or None.
        index: which latent, text and tokens each row has.
        timestep_cond: (P, E) guidance embeddings, or None.
        time_ids: (P, 6), or None for a network that does not read image sizes.
        residuals: a ControlNet's, B rows, or None.
        kept: (B, C, h, w) the activation that the cut enters the network with, channels-last for a run, or None.
        checkpoint: whether gradients are computed with the activations of one region at a time.
        last: whether these are the last rows of a stream.
    """

    def __init__(
        self,
        cut: Cut,
        latents: Tensor,
        timesteps: Tensor | Sequence[int] | int,
        text: TextKV | None,
        latent_index: Index | None,
        text_index: Index | None,
        timestep_cond: Tensor | None,
        time_ids: Tensor | None,
        residuals: Residuals | None,
        map_tokens: Tensor | Sequence[int] | None,
        *,
        kept: Tensor | None = None,
        checkpoint: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Check the arguments; see :meth:`Plan.run` for them.

        Args:
            device: where all but latents, residuals and what is kept go, which then stay where they are: the host's, to
                :meth:`take` rows of it. None: the network's, on which the latents must be.

        Raises:
            ValueError: an argument that does not fit, by name; a text encoded under another adapter.
        """
        checks.latents(cut.network, latents, cut.network.device if device is None else latents.device)
        count, (height, width) = len(latents), latents.shape[-2:]
        self.latents, self.kept, self.last, stays = latents, kept, False, device is not None
        if device is None:
            device = latents.device
            self.latents = latents.contiguous(memory_format=torch.channels_last)
        self.sizes = cut.network.sizes(height, width)
        self.checkpoint = checkpoint
        chosen = None if latent_index is None else checks.index("latent_index", latent_index, None, count, device)
        self.rows = count if chosen is None else len(chosen)
        checks.text(cut, text)
        texts = tokens = None
        if text is not None:
            texts = checks.text_index(text_index, len(text), self.rows, device)
        self.times = checks.timesteps(timesteps, count, device)
        self.timestep_cond = checks.timestep_cond(cut, timestep_cond, count, device)
        self.time_ids = checks.time_ids(cut, time_ids, count, device)
        self.residuals = residuals
        if residuals is not None:
            checks.residuals(cut.network, residuals, self.rows, height, width)
        checks.kept(cut, kept, self.rows, height, width, None if stays else device)
        if kept is not None and not stays:
            self.kept = kept.contiguous(memory_format=torch.channels_last)
        if text is not None and cut.maps_text:
            tokens = checks.positions("map_tokens", map_tokens, self.rows, text.tokens, device)
        self.text = None if text is None else text.narrowed(cut.key_layers, cut.value_layers)
        self.index = RowIndex(chosen, texts, tokens)

    def take(self, rows: Tensor, device: torch.device, *, last: bool = False) -> Request:
        """Give the request for some of its rows and the latents that they use, on ``device``; ``rows`` on the host.

        Args:
            last: whether no rows come after them.
        """
        latents, texts = (rows if index is None else index[rows] for index in self.index[:2])
        # (P',) the latents, ascending, and (B',) which of them each row has.
        used, local = torch.unique(latents, return_inverse=True)

        def of(chosen: Tensor) -> Change:
            return lambda value: upload(value[upload(chosen, value.device)], device)

        taken = copy.copy(self)
        taken.last = last
        # Those of latents and texts are taken above.
        taken.index = RowIndex(None, None, self.index.tokens)
        taken = taken._map(len(rows), of(used), of(rows))
        taken.latents = taken.latents.contiguous(memory_format=torch.channels_last)
        if taken.kept is not None:
            taken.kept = taken.kept.contiguous(memory_format=torch.channels_last)
        taken.index = taken.index._replace(
            latent=upload(local, device), text=None if self.text is None else upload(texts, device)
        )
        return taken

    def padded(self) -> Request:
        """Give this request with P, M and B rounded up to their buckets.

        What is added repeats latent 0, text 0 and row 0, so that it is as harmless as they are.
        """
        count, rows = bucket(len(self.latents)), bucket(self.rows)
        padded = self._map(rows, lambda value: pad(value, count), lambda value: pad(value, rows))
        return padded if self.text is None else padded.with_text(self.text.padded(bucket(len(self.text))))

    def cloned(self) -> Request:
        """Give a copy that shares no memory with this one, save the texts'."""
        return self._map(self.rows, torch.clone, torch.clone)

    def with_text(self, text: TextKV | None) -> Request:
        """Give the same request to other texts."""
        other = copy.copy(self)
        other.text = text
        return other

    def _map(self, rows: int, of_latents: Change, of_rows: Change) -> Request:
        """A copy of ``rows`` rows whose tensors with P entries, and those with B, are changed."""
        changed = copy.copy(self)
        changed.rows = rows
        changed.latents, changed.times = of_latents(self.latents), of_latents(self.times)
        if self.timestep_cond is not None:
            changed.timestep_cond = of_latents(self.timestep_cond)
        if self.time_ids is not None:
            changed.time_ids = of_latents(self.time_ids)
        changed.index = RowIndex(*(None if index is None else of_rows(index) for index in self.index))
        if self.residuals is not None:
            down, mid = self.residuals
            changed.residuals = [of_rows(value) for value in down], of_rows(mid)
        if self.kept is not None:
            changed.kept = of_rows(self.kept)
        return changed

    def embedded(
        self,
    ) -> tuple[Tensor, torch.dtype, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Give what the time embedding is made from, in the order of :meth:`Network.embed`."""
        pooled = None if self.text is None else self.text.pooled
        index = self.index
        return self.times, self.latents.dtype, self.timestep_cond, self.time_ids, pooled, index.latent, index.text

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for requests of the same bucket: padded, their tensors have the same shapes and types."""
        tokens = self.index.tokens
        return (
            bucket(self.rows),
            bucket(len(self.latents)),
            self.latents.shape[1:],
            self.text_key,
            (self.index.latent is None, self.index.text is None),
            self.times.dtype,
            self.timestep_cond is None,
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
        """Yield all tensors save the texts', in a fixed order."""
        rest = (*self.index, self.timestep_cond, self.time_ids, *self.every_residual, self.kept)
        return (x for x in (self.latents, self.times, *rest) if x is not None)

    @property
    def every_residual(self) -> tuple[Tensor, ...]:
        """The residuals one after another, the middle one last."""
        return () if self.residuals is None else (*self.residuals[0], self.residuals[1])


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
