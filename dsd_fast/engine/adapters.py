"""The adapters of a request, in the UNet and in the text encoders: chosen once, entered here alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from dsd_fast.models.tuners import adapter_names
from dsd_fast.unet.adapters import AdapterScope, Signature, strengths_by_layer


class Adapters:
    """Which adapters of a UNet and its text encoders a request is under; a LoRA may be in one of them, or in several.

    Args:
        unet: the UNet.
        text_encoders: in the model's order.
        names: of the adapters, () for none, at the strength that they have now; None leaves all as it stands.

    Attributes:
        unet: names of those of the UNet, for its plans; None leaves it as it stands.

    Raises:
        ValueError: an adapter that no part has.
    """

    def __init__(self, unet: Any, text_encoders: Sequence[Any], names: str | Sequence[str] | None) -> None:
        parts = (unet, *text_encoders)
        chosen: list[tuple[str, ...] | None] = [None] * len(parts)
        if names is not None:
            wanted = (names,) if isinstance(names, str) else tuple(names)
            owned = [adapter_names(part) for part in parts]
            known = set().union(*owned)
            for name in wanted:
                if name not in known:
                    having = ", ".join(sorted(known)) or "none"
                    raise ValueError(f"adapter: the model has no adapter {name!r}; it has {having}")
            chosen = [tuple(name for name in wanted if name in own) for own in owned]
        self.unet = chosen[0]
        self._parts = parts
        self._scopes = [AdapterScope(part, own) for part, own in zip(parts, chosen, strict=True)]

    def with_unet(self, unet: Any) -> Adapters:
        """Keep the text encoders' adapters, as strong as here, and take those active on another UNet at each call."""
        other = Adapters(unet, (), None)
        other._parts = (unet, *self._parts[1:])
        other._scopes = [*other._scopes, *self._scopes[1:]]
        return other

    @property
    def of_texts(self) -> Signature:
        """Equal where the same adapters of the text encoders are active, equally strong."""
        return tuple(scope.identity for scope in self._scopes[1:])

    @contextmanager
    def active(self, *, texts_only: bool = False) -> Iterator[None]:
        """Put the networks, or the text encoders alone, under these adapters inside the ``with`` block.

        Calls of other threads under other adapters wait for its end, and it for theirs.

        Raises:
            ValueError: an adapter that cannot be switched, see :meth:`AdapterScope.active`.
        """
        with ExitStack() as entered:
            for scope in self._scopes[int(texts_only) :]:
                entered.enter_context(scope.active())
            yield

    def strengths(self) -> list[dict[str, list[tuple[str, float]]]]:
        """Tell of each part which adapters act where and how strongly, see :func:`strengths_by_layer`."""
        with self.active():
            return [strengths_by_layer(part) for part in self._parts]
