"""Groups through a matcher: every image and text of a group against each other, none twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd_fast.engine import Texts
from dsd_fast.engine.items import prompt_check
from dsd_fast.images import ImageError
from dsd_fast.matching.groups import Group, wrong_text
from dsd_fast.matching.matcher import Matcher
from dsd_fast.matching.pairs import Pairs
from dsd_fast.models.prompts import token_limit

if TYPE_CHECKING:
    from dsd_fast.models import Model

# Text states held at once; an image whose texts do not fit together is encoded more than once.
_TEXT_BYTES = 1 << 30


@dataclass(frozen=True)
class Failure:
    """Why a group could not be scored.

    Attributes:
        reason: an :class:`~dsd_fast.images.ImageError`'s, "text-too-long" or "text-no-text".
        message: a sentence.
    """

    reason: str
    message: str


@dataclass(frozen=True, eq=False)
class GroupScores:
    """The two parts of a group's scores; their sum is the score.

    Attributes:
        attention: (images, texts) float64, the weighted attention term.
        noise: (images, texts) float64, the weighted noise-prediction term.
    """

    attention: NDArray[np.float64]
    noise: NDArray[np.float64]


def score_groups(matcher: Matcher, groups: Iterable[Group]) -> Iterator[GroupScores | Failure]:
    """The scores of each group, in order.

    Groups go through in runs with a GiB of text states; in a run an image or a text is encoded once, and a pair of
    several groups scored once. A group with an image or a text that cannot be used is a failure, and the others go on.

    Args:
        matcher: scores the pairs.
        groups: any number; taken as far as they are needed.
    """
    for chunk in _chunks(matcher.model, groups):
        yield from _score(matcher, chunk)


def _chunks(model: Model, groups: Iterable[Group]) -> Iterator[list[Group]]:
    """Runs of groups whose texts' states are held together."""
    width = sum(int(encoder.config.hidden_size) for encoder in model.text_encoders)
    limit = max(1, _TEXT_BYTES // (4 * width * token_limit(model.tokenizers, model.text_encoders)))
    chunk: list[Group] = []
    texts: set[str] = set()
    for group in groups:
        if chunk and len(texts.union(group.texts)) > limit:
            yield chunk
            chunk, texts = [], set()
        chunk.append(group)
        texts.update(group.texts)
    if chunk:
        yield chunk


def _score(matcher: Matcher, groups: Sequence[Group]) -> Iterator[GroupScores | Failure]:
    failures: dict[int, Failure] = {}
    work = _Work(groups)
    try:
        texts = matcher._scorer.encode_texts(work.pairs.texts)
    except ValueError:
        failures = _wrong_texts(matcher.model, groups)
        if not failures:
            raise
        work = _Work([group for number, group in enumerate(groups) if number not in failures])
        texts = matcher._scorer.encode_texts(work.pairs.texts)
    scored = work.score(matcher, texts)
    for number in range(len(groups)):
        yield failures[number] if number in failures else next(scored)


def _wrong_texts(model: Model, groups: Sequence[Group]) -> dict[int, Failure]:
    """The groups with a text that the encoders do not take, by position."""
    check = prompt_check(model)
    found = ((number, wrong_text(check, group)) for number, group in enumerate(groups))
    return {number: Failure(f"text-{wrong[0]}", wrong[1]) for number, wrong in found if wrong is not None}


class _Work:
    """The images, texts and pairs of some groups, each once, and the pairs of each group."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups, self.pairs = groups, Pairs()
        # Of each group its images, and its pairs, (images, texts).
        self.images_of: list[list[int]] = []
        self.pairs_of: list[NDArray[np.int64]] = []
        for group in groups:
            self.images_of.append([self.pairs.image(image) for image in group.images])
            self.pairs_of.append(np.array([[self.pairs.pair(i, t) for t in group.texts] for i in group.images]))

    def score(self, matcher: Matcher, texts: Texts) -> Iterator[GroupScores | Failure]:
        """Each group as soon as its last image is done; ``texts`` are the pairs'."""
        parts = torch.zeros(2, len(self.pairs), dtype=torch.float64, device="cpu")
        failed: dict[int, ImageError] = {}
        number = 0
        for done, chosen, scored, errors in self.pairs.scored(matcher._scorer, texts):
            failed |= errors
            parts[:, chosen] = scored
            while number < len(self.groups) and max(self.images_of[number]) < done:
                yield self._result(number, parts, failed)
                number += 1

    def _result(self, number: int, parts: Tensor, failed: dict[int, ImageError]) -> GroupScores | Failure:
        for image in self.images_of[number]:
            if image in failed:
                return Failure(failed[image].reason, str(failed[image]))
        attention, noise = parts.numpy()[:, self.pairs_of[number]]
        return GroupScores(attention, noise)
