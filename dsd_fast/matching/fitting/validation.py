"""How well a scorer does on held-out examples."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.examples import Examples, Query
from dsd_fast.matching.fitting.objective import group_loss
from dsd_fast.matching.score import PairScorer
from dsd_fast.metrics import ranks

# Texts whose keys are made together.
_TEXTS_AT_ONCE = 64


def validate(scorer: PairScorer, examples: Examples, fit: FitConfig) -> tuple[float, float]:
    """The share of the questions that the scorer's own timesteps answer right, ties counted as wrong; the mean loss."""
    right, total = 0, 0.0
    for queries in _chunks(examples.queries, scorer.images_at_once):
        images = sorted({image for query in queries for image in query.images})
        texts = sorted({text for query in queries for text in query.texts})
        pairs = [
            (images.index(image), texts.index(text))
            for query in queries
            for image in query.images
            for text in query.texts
        ]
        image_of, text_of = torch.tensor(pairs, device="cpu").unbind(1)
        encoded = scorer.texts(examples.states(texts), examples.unconditional)
        values = scorer.score(examples.latents[images], encoded, image_of, text_of)
        sizes = [len(query.images) * len(query.texts) for query in queries]
        for query, own in zip(queries, torch.split(values, sizes), strict=True):
            right += int(ranks(own.numpy(), query.label)) == 1
            total += float(group_loss(own, query.label, fit))
    return right / len(examples.queries), total / len(examples.queries)


def _chunks(queries: list[Query], images_at_once: int) -> Iterator[list[Query]]:
    """Questions whose images may be noised together."""
    chunk: list[Query] = []
    images: set[int] = set()
    texts: set[int] = set()
    for query in queries:
        more_images, more_texts = images.union(query.images), texts.union(query.texts)
        if chunk and (len(more_images) > images_at_once or len(more_texts) > _TEXTS_AT_ONCE):
            yield chunk
            chunk, more_images, more_texts = [], set(query.images), set(query.texts)
        chunk.append(query)
        images, texts = more_images, more_texts
    yield chunk
