"""What a run of zero-shot learning tells, as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsd_fast.metrics import ZeroShot, best_penalty, class_means, zero_shot

if TYPE_CHECKING:
    from dsd_fast.engine.tokens import LearnedTokens
    from dsd_fast.models import Model

NAMES = ("t1", "u", "s", "h")

Scores = NDArray[np.float64]
Labels = NDArray[np.intp]
Seen = NDArray[np.bool_]

_PENALTIES = np.linspace(0, 1, 21).tolist()
_RESAMPLES = 2000
# Fewer have no neighbourhoods to keep.
_FEWEST, _PERPLEXITY = 6, 30.0


def figures(scores: Scores, labels: Labels, seen: Seen, penalty: float) -> dict[str, Any]:
    """Tell "t1", "u", "s", "h" at a penalty, their 95 % "intervals" over test images, and each class's accuracy.

    Intervals are of the bootstrap within each class, whose images are drawn anew; the classes are as they are.
    "test_tuned" has the penalty with the best H of these very images, and what it gives.
    """
    found, tuned = zero_shot(scores, labels, seen, penalty), best_penalty(scores, labels, seen)
    alone = class_means(np.where(seen, -np.inf, scores).argmax(1) == labels, labels, len(seen))
    counts = np.bincount(labels, minlength=len(seen))
    rng, there = np.random.default_rng(0), counts > 0

    def drawn(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
        # Of each class as many images as it has, with replacement: so many of them are right.
        return rng.binomial(counts[there], accuracy[there], (_RESAMPLES, there.sum())) / counts[there]

    among_all, unseen = drawn(found.per_class), ~seen[there]
    u, s = among_all[:, unseen].mean(1), among_all[:, ~unseen].mean(1)
    h = 2 * u * s / np.maximum(u + s, np.finfo(np.float64).tiny)
    resampled = (drawn(alone)[:, unseen].mean(1), u, s, h)
    return {
        **plain(found),
        "penalty": penalty,
        "intervals": {
            name: np.quantile(each, (0.025, 0.975)).tolist() for name, each in zip(NAMES, resampled, strict=True)
        },
        "test_tuned": {"penalty": tuned, **plain(zero_shot(scores, labels, seen, tuned))},
        "per_class": [None if math.isnan(each) else each for each in found.per_class.tolist()],
    }


def plain(found: ZeroShot) -> dict[str, float]:
    """Tell T1, U, S and H by name."""
    return {name: getattr(found, name) for name in NAMES}


def curve(scores: Scores, labels: Labels, seen: Seen) -> list[dict[str, float]]:
    """Tell T1, U, S and H at penalties from 0 to 1."""
    return [{"penalty": each, **plain(zero_shot(scores, labels, seen, each))} for each in _PENALTIES]


def tsne(tokens: LearnedTokens, model: Model, seed: int) -> list[dict[str, Any]]:
    """Place tokens, and the means of their classes' names' vectors, in the plane by t-SNE (van der Maaten 2008).

    Returns:
        {"class", "kind": "token" or "name", "x", "y"} each; none of fewer than six points.
    """
    from sklearn.manifold import TSNE

    points: list[dict[str, Any]] = []
    vectors: list[NDArray[np.float32]] = []
    table = model.text_encoders[0].get_input_embeddings().weight
    for token, own in tokens.items():
        learned = own["clip_l"] if isinstance(own, Mapping) else own
        name = tokens.classes[token]
        words = model.tokenizers[0](name, add_special_tokens=False)["input_ids"]
        for kind, rows in (("token", learned), ("name", table[words])):
            points.append({"class": name, "kind": kind})
            vectors.append(rows.detach().float().mean(0).cpu().numpy())
    if len(points) < _FEWEST:
        return []
    placed = TSNE(perplexity=min(_PERPLEXITY, (len(points) - 1) / 3), init="pca", random_state=seed % 2**32)
    where = placed.fit_transform(np.stack(vectors)).tolist()
    return [{**point, "x": x, "y": y} for point, (x, y) in zip(points, where, strict=True)]


def counts_up_to(counts: Sequence[int], most: int) -> list[int]:
    """Cut numbers of images at the most that there are, each once."""
    return sorted({min(count, most) for count in counts})
