"""Negatives drawn by a seed and the group's own content, so that the order of the groups does not change them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

# As in the official code: with the right one, ten candidates.
NEGATIVES = 9

# A pool that holds enough different candidates gives them long before.
_TRIES = 100_000


class Draws:
    """Random numbers of one group.

    Args:
        seed: of all groups.
        key: what tells the group from others.
    """

    def __init__(self, seed: int, *key: str) -> None:
        digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
        self._random = random.Random(int.from_bytes(digest, "big"))

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, each as likely."""
        # random() gives the same numbers in every version of Python, which the other methods do not promise.
        return items[int(self._random.random() * len(items))]

    def different(self, draw: Callable[[], T | None], place: str, what: str) -> list[T]:
        """Nine different items, drawn one by one; None draws again.

        Raises:
            ValueError: there are not so many.
        """
        chosen: dict[T, None] = {}
        for _ in range(_TRIES):
            item = draw()
            if item is not None:
                chosen[item] = None
            if len(chosen) == NEGATIVES:
                return list(chosen)
        raise ValueError(f"{place}: the file has {len(chosen)} other {what} to draw from, expected {NEGATIVES} or more")
