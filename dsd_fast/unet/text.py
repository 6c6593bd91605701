"""The keys and values of encoded texts, once per text and layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsd_fast.kernels.common.host import as_tensor
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.unet.adapters import Signature, version


class LayerText(NamedTuple):
    """M texts as one cross-attention layer sees them; the attributes are those of :class:`TextKV`."""

    k: Tensor
    v: Tensor | None
    lengths: Tensor | None
    key_bias: Tensor | None
    score_mask: Tensor | None


@dataclass(frozen=True)
class TextKV:
    """M texts as the cross-attention layers of a plan see them; made by ``plan.encode_text``.

    Attributes:
        k: score id → (M, T, H·D) keys.
        v: score id → (M, T, H·D) values; a layer that only scores has none.
        lengths: (M,) int64; keys at or beyond it are not read. None: all T are.
        key_bias: (M, T) float32 added to the logits: −inf masks, log n counts a key n times. None: zeros.
        score_mask: (M, T) bool, the keys that count in scores. None: all.
        pooled: (M, E) pooled text states, for networks whose time embedding reads them (SDXL).
        signature: what adapters did to each layer's key and value projections.
    """

    k: Mapping[str, Tensor]
    v: Mapping[str, Tensor]
    count: int
    tokens: int
    lengths: Tensor | None = None
    key_bias: Tensor | None = None
    score_mask: Tensor | None = None
    pooled: Tensor | None = None
    signature: Mapping[str, Signature] | None = None
    _padded: dict[str, tuple[Any, TextKV]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _narrowed: dict[Any, TextKV] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> TextKV:
        """The texts of a slice (views) or of a list of positions (copies)."""
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim != 1):
            raise TypeError("text: index with a slice or a list of positions, not one integer: text[i : i + 1]")
        kept = torch.arange(self.count, device="cpu")[index if isinstance(index, slice) else as_tensor(index)]

        if isinstance(index, slice):
            return self._map(lambda value: value[index], len(kept))
        own = upload(kept, next((x.device for x in self.tensors()), kept.device))
        return self._map(lambda value: value[own], len(kept))

    def layer(self, name: str) -> LayerText:
        """What the attention of that score id reads."""
        return LayerText(self.k[name], self.v.get(name), self.lengths, self.key_bias, self.score_mask)

    def narrowed(self, key_layers: tuple[str, ...], value_layers: tuple[str, ...]) -> TextKV:
        """These texts for those layers alone, in that order; they share memory. The same object at each call."""
        if tuple(self.k) == key_layers and tuple(self.v) == value_layers:
            return self
        layers = (key_layers, value_layers)
        if layers not in self._narrowed:
            self._narrowed[layers] = replace(
                self, k={name: self.k[name] for name in key_layers}, v={name: self.v[name] for name in value_layers}
            )
        return self._narrowed[layers]

    def padded(self, count: int) -> TextKV:
        """These texts and the first one again until there are ``count``.

        The answer is kept as long as this object lives and its tensors are not written to, so that a request whose
        texts stay copies their keys once. With gradients it is made anew, and where :attr:`versions` is None.
        """
        if count == self.count:
            return self
        versions = self.versions
        if versions is None or any(x.requires_grad for x in self.tensors()):
            return self.copied(count)
        signature, padded = self._padded.get("last", (None, self))
        if signature != (count, versions):
            # A later run may want gradients, and tensors made in inference mode could not have any.
            with torch.inference_mode(False), torch.no_grad():
                padded = self.copied(count)
            self._padded["last"] = (count, versions), padded
        return padded

    def copied(self, count: int) -> TextKV:
        """Like :meth:`padded`, in memory of its own."""
        positions = torch.arange(count, device="cpu")
        return self[positions.where(positions < self.count, 0)]

    @property
    def versions(self) -> list[tuple[int, int]] | None:
        """Another one after each write to a tensor; None for tensors made in inference mode, which keep no count."""
        tensors = list(self.tensors())
        return None if any(x.is_inference() for x in tensors) else [version(x) for x in tensors]

    @property
    def optional(self) -> tuple[bool, ...]:
        """Which of lengths, key_bias, score_mask and pooled there are."""
        return tuple(x is not None for x in (self.lengths, self.key_bias, self.score_mask, self.pooled))

    def _map(self, change: Callable[[Tensor], Tensor], count: int) -> TextKV:
        def changed(value: Tensor | None) -> Any:
            return None if value is None else change(value)

        return replace(
            self,
            k={name: change(value) for name, value in self.k.items()},
            v={name: change(value) for name, value in self.v.items()},
            count=count,
            lengths=changed(self.lengths),
            key_bias=changed(self.key_bias),
            score_mask=changed(self.score_mask),
            pooled=changed(self.pooled),
        )

    def tensors(self) -> Iterator[Tensor]:
        """All tensors, in a fixed order."""
        rest = (self.lengths, self.key_bias, self.score_mask, self.pooled)
        return (x for x in (*self.k.values(), *self.v.values(), *rest) if x is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self.tensors())

    @staticmethod
    def concat(parts: Sequence[TextKV]) -> TextKV:
        """The texts of all parts, in order.

        Raises:
            ValueError: parts of different layers, token counts or adapters, or some without what others have.
        """
        if not parts:
            raise ValueError("parts: got no TextKV to concatenate")
        first = parts[0]
        for part in parts[1:]:
            for what, same in (
                ("token counts", part.tokens == first.tokens),
                ("layers", part.k.keys() == first.k.keys() and part.v.keys() == first.v.keys()),
                ("adapters", part.signature == first.signature),
            ):
                if not same:
                    raise ValueError(f"parts: cannot concatenate texts encoded for different {what}")

        def join(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            if all(value is None for value in values):
                return None
            if any(value is None for value in values):
                raise ValueError(f"parts: {name} is given for some texts and not for others")
            return torch.cat(values)

        return TextKV(
            k={name: torch.cat([part.k[name] for part in parts]) for name in first.k},
            v={name: torch.cat([part.v[name] for part in parts]) for name in first.v},
            count=sum(len(part) for part in parts),
            tokens=first.tokens,
            lengths=join("lengths"),
            key_bias=join("key_bias"),
            score_mask=join("score_mask"),
            pooled=join("pooled"),
            signature=first.signature,
        )
