"""Groups: one question each, an image with candidate texts or a text with candidate images."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dsd_fast.engine.items import PromptCheck
from dsd_fast.images import ImageSource, Taken, drawn, take

_SOURCES = "a pathlib.Path, a Pillow image, a uint8 array (H, W, C) or a float tensor (C, H, W)"
_FORMS = "a Group, (image, [texts], label) or ([images], text, label)"


@dataclass(frozen=True)
class Group:
    """Candidates and which of them is right.

    ========= =========== ====================================================================
    images    texts       the question
    ========= =========== ====================================================================
    1         K ≥ 2       which text describes the image: ``texts[label]``
    K ≥ 2     1           which image the text describes: ``images[label]``
    n ≥ 2     n           both, for each of them (as in Winoground): text i belongs to image i
    ========= =========== ====================================================================

    Nothing is decoded and no file is looked at. Candidates may be equal: a tie is the metrics' business.

    Attributes:
        images: sources as :func:`dsd_fast.images.load_image` takes them; a list becomes a tuple.
        texts: strings; a list becomes a tuple.
        label: position of the right candidate, from 0; 0 in a paired group.
        category: figures are also given by category; "" for none.
        id: the group's name in results; "" for none.

    Raises:
        ValueError: a number of images and texts that is none of the three, a label that no candidate has, or an item of
            another type, by name.
    """

    images: tuple[ImageSource, ...]
    texts: tuple[str, ...]
    label: int = 0
    category: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        for name in ("images", "texts"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{name}: got {_shown(value)}, expected a tuple")
            object.__setattr__(self, name, tuple(value))
        for place, image in enumerate(self.images):
            if isinstance(image, str):
                raise ValueError(f"images[{place}]: got the str {image[:80]!r}; use pathlib.Path for a file")
            if not _is_source(image):
                raise ValueError(f"images[{place}]: got {_shown(image)}, expected {_SOURCES}")
        for place, text in enumerate(self.texts):
            if not isinstance(text, str):
                raise ValueError(f"texts[{place}]: got {_shown(text)}, expected a str")
        for name in ("category", "id"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: got {_shown(getattr(self, name))}, expected a str")
        n, m = len(self.images), len(self.texts)
        if not (min(n, m) == 1 < max(n, m) or n == m >= 2):
            raise ValueError(
                f"images, texts: got {n} and {m}, expected 1 image with 2 texts or more, 2 images or more with 1 text, "
                "or as many images as texts, 2 or more"
            )
        self._check_label()

    def _check_label(self) -> None:
        label: Any = self.label
        if isinstance(label, (bool, np.bool_)) or not isinstance(label, (int, np.integer)):
            raise ValueError(f"label: got {_shown(label)}, expected an int")
        label = operator.index(label)
        object.__setattr__(self, "label", label)
        if self.paired:
            if label != 0:
                raise ValueError(f"label: got {label}, expected 0 where text i belongs to image i")
        elif not 0 <= label < self.num_candidates:
            raise ValueError(f"label: got {label}, expected 0 to {self.num_candidates - 1}, the candidates' positions")

    @property
    def paired(self) -> bool:
        """Whether text i belongs to image i, for n ≥ 2 of each."""
        return len(self.images) > 1 and len(self.texts) > 1

    @property
    def num_candidates(self) -> int:
        """K; of a paired group n, the candidates of each of its questions."""
        return max(len(self.images), len(self.texts))

    @property
    def right_image(self) -> ImageSource:
        """The image, the right one of several, or the first of a paired group."""
        return self.images[self.label if len(self.images) > 1 else 0]

    def queries(self) -> list[Group]:
        """The group as one-question groups: itself, or the 2n of a paired one.

        Those are, in this order, each image i with all texts, then each text i with all images, every one with label i
        and the same category; their ids end in ``/image<i>`` and ``/text<i>`` where the group has an id.
        """
        if not self.paired:
            return [self]

        def own(images: tuple[ImageSource, ...], texts: tuple[str, ...], label: int, kind: str) -> Group:
            return Group(images, texts, label, self.category, f"{self.id}/{kind}{label}" if self.id else "")

        by_image = [own((image,), self.texts, i, "image") for i, image in enumerate(self.images)]
        return by_image + [own(self.images, (text,), i, "text") for i, text in enumerate(self.texts)]

    @classmethod
    def of(cls, example: Any) -> Group:
        """A group from a group, or from a tuple as one writes it.

        Args:
            example: a :class:`Group`, which is given back; (image, [texts], label); ([images], text, label); or
                ([images], [texts], 0), of a paired group. The lists may be tuples.

        Raises:
            ValueError: something else, or what :class:`Group` refuses.
        """
        if isinstance(example, Group):
            return example
        if not isinstance(example, (list, tuple)):
            raise ValueError(f"example: got {_shown(example)}, expected {_FORMS}")
        if len(example) != 3:
            raise ValueError(f"example: got {len(example)} values, expected 3: {_FORMS}")
        images, texts, label = example
        if not isinstance(images, (list, tuple)):
            images = (images,)
        if isinstance(texts, str):
            texts = (texts,)
        return cls(images, texts, label)


def wrong_text(check: PromptCheck, group: Group) -> tuple[str, str] | None:
    """What is wrong with the first text of a group that text encoders do not take, as ``check`` says it; or None."""
    for text in group.texts:
        wrong = check(text)
        if wrong is not None:
            return wrong[0], f"text {text[:40]!r}… {wrong[1].removeprefix('the prompt ')}"
    return None


def drawn_groups(examples: Iterable[Any]) -> Iterator[Group]:
    """The groups that :meth:`Group.of` makes of examples, as :func:`~dsd_fast.images.drawn` has their images."""
    return map(Group.of, drawn(examples, _taken))


def _taken(example: Any) -> Group:
    group = Group.of(example)
    return replace(group, images=tuple(map(take, group.images)))


def _is_source(value: object) -> bool:
    return isinstance(value, (os.PathLike, Image.Image, np.ndarray, Tensor, Taken))


def _shown(value: object) -> str:
    if value is None or isinstance(value, (str, int, float)):
        return f"{type(value).__name__} {repr(value)[:80]}" if value is not None else "None"
    return f"a {type(value).__name__}"
