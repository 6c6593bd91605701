"""How well the noise term tells true captions from nearly true ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.progress import track

from dsd_fast.bench.case import Figure
from dsd_fast.bench.suites.shared import middles, rivals
from dsd_fast.matching import MatchConfig, Matcher
from dsd_fast.matching.localisation import pointing_game
from dsd_fast.metrics import wilson
from dsd_fast.models import Model
from dsd_fast.models.mini.digits import DIGIT_NAMES, EVALUATION, caption, digit
from dsd_fast.models.mini.scenes import EVAL_SEED, NEGATIVE_KINDS, scene

__all__ = ["digit_choices", "digits", "pointing", "scenes"]

_AT_ONCE = 16
_WAYS = {"3-way": 3, **dict.fromkeys(NEGATIVE_KINDS, 2)}


def digit_choices(index: int, label: int) -> list[str]:
    """The true caption of an evaluation digit, then those of three other digits."""
    others = np.random.default_rng((index, 4)).permutation([x for x in range(len(DIGIT_NAMES)) if x != label])[:3]
    return [caption(label), *(caption(int(other)) for other in others)]


def scenes(model: Model, steps: int, n: int, group: str, held_out: bool, floor: float | None = None) -> list[Figure]:
    """Shares of `n` evaluation scenes whose true caption the noise term of `steps` timesteps puts first.

    The timesteps are the middles of `steps` equal parts of the schedule.

    "3-way" sets the caption against two of its colour, shape and swap negatives, chosen by the seed; each kind alone is
    2-way. One-object scenes have no swap and no relation.
    """
    right = dict.fromkeys(_WAYS, 0)
    counts = dict.fromkeys(_WAYS, 0)
    matcher = _matcher(model, steps)
    for start in track(range(0, n, _AT_ONCE), f"{group}, T = {steps}", transient=True):
        drawn = [scene(EVAL_SEED + i, held_out=held_out) for i in range(start, min(start + _AT_ONCE, n))]
        negatives = [each.negatives() for each in drawn]
        texts = [[each.caption, *wrong.values()] for each, wrong in zip(drawn, negatives, strict=True)]
        found = _predict(matcher, [each.image for each in drawn], texts)
        for each, wrong, scores in zip(drawn, negatives, found, strict=True):
            won = {kind: bool(scores[0] > score) for kind, score in zip(wrong, scores[1:], strict=True)}
            won["3-way"] = all(won[kind] for kind in rivals(each))
            for kind, win in won.items():
                right[kind] += win
                counts[kind] += 1
    return [
        Figure.share(
            f"{group}, {kind}, T = {steps}",
            right[kind],
            counts[kind],
            chance=1 / ways,
            floor=floor if kind == "3-way" else None,
            sizes={"timesteps": steps},
        )
        for kind, ways in _WAYS.items()
        if counts[kind]
    ]


def digits(model: Model, steps: int, n: int = len(EVALUATION), floor: float | None = None) -> list[Figure]:
    """Share of the evaluation digits whose caption the noise term puts before those of three other digits."""
    right = 0
    matcher = _matcher(model, steps)
    indices = list(EVALUATION)[:n]
    for start in track(range(0, n, _AT_ONCE), f"digits, T = {steps}", transient=True):
        drawn = [digit(index, EVAL_SEED) for index in indices[start : start + _AT_ONCE]]
        texts = [digit_choices(start + EVALUATION.start + i, each.label) for i, each in enumerate(drawn)]
        found = _predict(matcher, [each.image for each in drawn], texts)
        right += sum(bool(scores[0] > scores[1:].max()) for scores in found)
    return [
        Figure.share(
            f"digits, 4-way, T = {steps}",
            right,
            n,
            chance=1 / 4,
            floor=floor,
            sizes={"timesteps": steps},
        )
    ]


def pointing(model: Model, n: int) -> list[Figure]:
    """The pointing game over the words of `n` evaluation scenes' captions, heat maps of four timesteps.

    Two words of one scene share picture, text and noise: the interval is that of `n` observations, however many words.
    """
    played = track([scene(EVAL_SEED + i) for i in range(n)], "heat maps", transient=True)
    found = pointing_game(_matcher(model, 4), played)
    return [
        Figure(
            f"{kind} words",
            point.right / point.n,
            *wilson(round(n * point.right / point.n), n),
            n,
            chance=point.chance,
            sizes={"timesteps": 4},
        )
        for kind, point in found.items()
    ]


def _matcher(model: Model, steps: int) -> Matcher:
    return Matcher(model, MatchConfig(timesteps=middles(steps), attention_weight=0))


def _predict(matcher: Matcher, images: Sequence[np.ndarray], texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
    pairs = [(image, text) for image, some in zip(images, texts, strict=True) for text in some]
    scores = matcher.predict(pairs).numpy()
    return np.split(scores, np.cumsum([len(some) for some in texts])[:-1])
