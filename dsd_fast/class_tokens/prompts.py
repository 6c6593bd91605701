"""Classes' tokens, and the texts that name them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import torch

from dsd_fast.class_tokens.config import TokenConfig
from dsd_fast.engine.templates import filled
from dsd_fast.training import seed_of

# The last number of a draw's key: of an update's order of templates, and the halves of its noise's seed. Images have
# those from _IMAGES on.
_ORDER, _HIGH, _LOW, _IMAGES = 1, 2, 3, 4


class Prompts:
    """The texts of classes, and what each of their updates draws.

    Args:
        names: of the classes.
        config: the settings.

    Attributes:
        tokens: of the classes, in their order.

    Raises:
        ValueError: two classes whose tokens are the same.
    """

    def __init__(self, names: Sequence[str], config: TokenConfig) -> None:
        self._config = config
        self._spelt = [name.replace("_", " ").strip() for name in names]
        self._keys = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") for name in names]
        self.tokens = [config.token.replace("{}", re.sub(r"[\s_]+", "-", name.strip())) for name in names]
        for number, token in enumerate(self.tokens):
            if (first := self.tokens.index(token)) < number:
                raise ValueError(f"classes: {names[first]!r} and {names[number]!r} both have the token {token!r}")

    def initial(self, number: int) -> list[str]:
        """Give the words that a class's token may begin as."""
        given = self._config.initial
        words = (given,) if isinstance(given, str) else given
        return [each.replace("{}", self._spelt[number]) for each in words]

    def every(self, number: int) -> list[str]:
        """Give a class's texts, one for each template."""
        token, name = self.tokens[number], self._spelt[number]
        return self._filled(f"{token} {name}" if self._config.class_name else token)

    def plain(self, number: int) -> list[str]:
        """Give the texts that say a class's name in place of its token."""
        return self._filled(self._spelt[number])

    def _filled(self, said: str) -> list[str]:
        return [filled(template, said) for template in self._config.templates]

    def texts(self, number: int, update: int) -> list[str]:
        """Give the texts of a class's images in one of its updates, of as many templates as there are images for."""
        every, images = self.every(number), self._config.images
        random = torch.Generator().manual_seed(self.seed(number, update, _ORDER))
        order = torch.randperm(max(images, len(every)), generator=random, device="cpu").tolist()
        return [every[place % len(every)] for place in order[:images]]

    def first(self, number: int) -> list[str]:
        """Give the texts of a class's images by which beginnings are compared."""
        every = self.every(number)
        return [every[image % len(every)] for image in range(self._config.compared)]

    def noise_seed(self, number: int, update: int) -> int:
        """Give the 64-bit seed of a class's fresh noise in one of its updates."""
        return self.seed(number, update, _HIGH) << 32 | self.seed(number, update, _LOW)

    def image_seed(self, number: int, update: int, image: int) -> int:
        """Give the seed of what the noise loss draws for one of an update's images."""
        return self.seed(number, update, _IMAGES + image)

    def seed(self, number: int, update: int, what: int) -> int:
        return seed_of(self._config.seed, self._keys[number], update, what)
