"""Examples made ready: what does not depend on the parameters is computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsd_fast.matching.groups import Group
from dsd_fast.matching.pairs import Pairs
from dsd_fast.matching.score import PairScorer
from dsd_fast.models import PromptStates

# Text states kept in host memory; of more texts each step encodes its own.
_TEXT_BYTES = 2 << 30


@dataclass(frozen=True)
class Query:
    """One image and its candidate texts, or one text and its candidate images, as positions in the examples."""

    images: tuple[int, ...]
    texts: tuple[int, ...]
    label: int


class Examples:
    """Groups as latents and text states.

    Each image goes through the VAE once, each text through the text encoder once, or once per step where the states of
    all do not fit in memory.

    Args:
        scorer: whose model encodes them.
        groups: one or more; a paired group counts as its 2n questions.

    Attributes:
        queries: the questions.
        latents: (N, C, h, w) clean latents of the images, on the CPU.
        digest: hexadecimal, of pixels, texts and labels.
        unconditional: states of the absent text, M = 1; None where the score has no use for them.

    Raises:
        ImageError: an image that cannot be used.
        ValueError: a text that is too long.
    """

    def __init__(self, scorer: PairScorer, groups: Sequence[Group]) -> None:
        self._scorer = scorer
        unique = Pairs()
        self.queries: list[Query] = []
        for group in groups:
            for query in group.queries():
                shown, said = map(unique.image, query.images), map(unique.text, query.texts)
                self.queries.append(Query(tuple(shown), tuple(said), query.label))
        self._texts = unique.texts
        digest = hashlib.sha256(repr((self._texts, self.queries)).encode())
        self.latents = scorer.engine.encode_sources(unique.images, digest)
        self.digest = digest.hexdigest()
        first = scorer.encode_texts(self._texts[:1])
        self.unconditional = first.unconditional
        fits = len(self._texts) * first.states.states.nbytes <= _TEXT_BYTES
        self._states = scorer.encode_texts(self._texts, unconditional=False).states if fits else None

    def states(self, texts: Sequence[int]) -> PromptStates:
        """The text states of some texts, by their positions."""
        if self._states is not None:
            return self._states[torch.tensor(texts, device="cpu")]
        return self._scorer.encode_texts([self._texts[i] for i in texts], unconditional=False).states
