"""Few-shot adaptation of the matching score on scenes of two objects: what is learned from how many examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.suites.intervals import interval
from dsd_fast.bench.case import Context, Figure
from dsd_fast.bench.suites.shared import middles, mini
from dsd_fast.images import decode
from dsd_fast.matching import Group, MatchConfig, Matcher
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.score import PairScorer
from dsd_fast.models import PromptStates
from dsd_fast.models.mini.scenes import EVAL_SEED, NEGATIVE_KINDS, Scene, scene

N = 1000
"""Evaluation scenes of a figure."""
EXAMPLES = (16, 64, 256, 1024)
FITS = 3
"""Fits behind a figure, each with examples and first weights of its own."""
EXAMPLE_SEED = 800_000_000
"""Scenes from here on are examples to adapt to, and used for nothing else."""
_EXAMPLES_APART = 1_000_000

FIT = FitConfig(steps=200, batch_size=6)
CONFIG = MatchConfig(timesteps=middles(1))
OBJECTIVES = {
    "attention": replace(CONFIG, noise_weight=0.0),
    "noise": replace(CONFIG, attention_weight=0.0),
    "both": CONFIG,
}
"""By name, the score that is trained, and then evaluated."""
METHODS = {
    "lora": "LoRA",
    "prompt": "learned prompt",
    "heads": "weights of heads",
    "lora+heads": "LoRA and weights of heads",
}

TRAINED_KINDS = ("colour", "shape", "relation")
"""Negatives of the examples. The swap of the two objects' colours is in none of them."""

_SCENES_AT_ONCE = 20

Scores = Mapping[str, NDArray[np.float32]]
Answers = Mapping[str, NDArray[np.bool_]]
"""By part of the score."""


@dataclass(frozen=True)
class EvaluationSet:
    """A question asked of evaluation scenes: the caption or one of its negatives?

    Attributes:
        name: of the set.
        held_out: whether its scenes have a colour and shape never trained on together.
        kinds: of the negatives that compete with the caption.
    """

    name: str
    held_out: bool
    kinds: Sequence[str]

    def right(self, scores: NDArray[np.float32], kinds: Sequence[str]) -> NDArray[np.bool_]:
        """(n,) from (n, 1 + negatives) scores, the negatives of all `kinds` in order; a tie is wrong."""
        rivals = [1 + kinds.index(kind) for kind in self.kinds]
        return np.asarray(scores[:, 0] > scores[:, rivals].max(1))


SETS = (
    EvaluationSet("new scenes", False, TRAINED_KINDS),
    EvaluationSet("held-out negatives", False, ("swap",)),
    EvaluationSet("held-out pairs", True, TRAINED_KINDS),
)


@dataclass(frozen=True, eq=False)
class Scenes:
    """Evaluation scenes as no adaptation changes them.

    Attributes:
        latents: (n, C, h, w) clean latents.
        states: of n · (1 + negatives) texts, each scene's side by side, its caption first.
        kinds: of the negatives.
    """

    latents: Tensor
    states: PromptStates
    kinds: Sequence[str]


def example(drawn: Scene, kinds: Sequence[str] = TRAINED_KINDS) -> Group:
    """A scene with its caption, which is right, and its negatives of those kinds."""
    negatives = drawn.negatives()
    return Group((drawn.image,), (drawn.caption, *(negatives[kind] for kind in kinds)))


def examples(count: int, fit: int, kinds: Sequence[str] = TRAINED_KINDS) -> list[Group]:
    """The first examples of a fit, by its number; those of two fits have none in common."""
    first = EXAMPLE_SEED + _EXAMPLES_APART * fit
    return [example(scene(first + place, objects=2), kinds) for place in range(count)]


def evaluation_scenes(context: Context, n: int, held_out: bool) -> Scenes:
    """The first evaluation scenes of two objects, through the VAE and the text encoder once for all cases."""
    kinds = sorted(
        {kind for each in SETS if each.held_out == held_out for kind in each.kinds}, key=NEGATIVE_KINDS.index
    )

    def make() -> Scenes:
        groups = [example(scene(EVAL_SEED + i, objects=2, held_out=held_out), kinds) for i in range(n)]
        scorer = PairScorer.of(mini(context), CONFIG)
        pixels: list[Any] = [image for _, image in decode([group.images[0] for group in groups], scorer.engine.size)]
        texts = [text for group in groups for text in group.texts]
        return Scenes(
            scorer.engine.encode_images(pixels), scorer.encode_texts(texts, unconditional=False).states, kinds
        )

    return context.shared(f"scenes of two objects, {n}, {held_out}", make)


def score(scorer: PairScorer, scenes: Scenes) -> Scores:
    """(n, 1 + negatives) scores by "attention", "noise" and "both"; without a part whose weight is 0.

    The unconditional row is left out: it shifts all texts of an image alike.
    """
    config, each = scorer.config, 1 + len(scenes.kinds)
    attention, noise = [], []
    for start in range(0, len(scenes.latents), _SCENES_AT_ONCE):
        latents = scenes.latents[start : start + _SCENES_AT_ONCE]
        texts = torch.arange(len(latents) * each)
        terms = scorer.begin(latents, scorer.texts(scenes.states[each * start + texts]), texts // each, texts).done()
        attention.append(config.attention_weight * terms.attention.mean(1))
        noise.append(-config.noise_weight * terms.error.mean(1))
    found = {"attention": torch.cat(attention), "noise": torch.cat(noise)}
    found["both"] = found["attention"] + found["noise"]
    weights = {"attention": config.attention_weight, "noise": config.noise_weight}
    wanted = [part for part, weight in weights.items() if weight]
    wanted += ["both"] if len(wanted) == 2 else []
    return {part: found[part].view(-1, each).numpy().astype(np.float32) for part in wanted}


def answers(scorer: PairScorer, context: Context, n: int) -> Iterator[tuple[EvaluationSet, Answers]]:
    """Of each set what is right, (n,) by part of the score."""
    scored = {}
    for held_out in (False, True):
        scenes = evaluation_scenes(context, n, held_out)
        scored[held_out] = scenes.kinds, score(scorer, scenes)
    for each in SETS:
        kinds, parts = scored[each.held_out]
        yield each, {part: each.right(scores, kinds) for part, scores in parts.items()}


def zero_shot(context: Context, *, n: int = N) -> list[Figure]:
    """Before any adaptation, with the official layers and, as weights of heads begin, with all of them."""
    figures = []
    model = mini(context)
    for layers, name in (("official", ""), ("all", " (all layers)")):
        for each, parts in answers(PairScorer.of(model, replace(CONFIG, layers=layers)), context, n):
            for part, right in parts.items():
                if name and part == "noise":
                    continue
                figures.append(
                    Figure.share(
                        f"{each.name}: zero-shot, {part}{name}, 0 examples",
                        int(right.sum()),
                        n,
                        chance=_chance(each),
                        sizes={"examples": 0},
                        group=slug(each),
                    )
                )
    return figures


def adapted(
    method: str, objective: str, count: int, context: Context, *, n: int = N, fit: FitConfig = FIT, fits: int = FITS
) -> list[Figure]:
    """After fits to examples: the share right of each set, the mean over the fits.

    Args:
        method: a key of :data:`METHODS`.
        objective: a key of :data:`OBJECTIVES`.
        count: examples of a fit.
        context: of the run.
        n: evaluation scenes of each set.
        fit: settings; each fit has its own seed.
        fits: how many.
    """
    config = OBJECTIVES[objective]
    if "heads" in method:
        config = replace(config, layers="all")
    figures = []
    for (each, part), right in right_after(method, config, count, context, n=n, fit=fit, fits=fits).items():
        line = f"{METHODS[method]} for {objective}" + (f", {part} alone" if part != objective else "")
        group = slug(each) if part == objective else f"{slug(each)}-parts"
        figures.append(mean_over_fits(f"{each.name}: {line}, {count} examples", each, right, count, group))
    return figures


def right_after(
    method: str,
    config: MatchConfig,
    count: int,
    context: Context,
    *,
    n: int,
    fit: FitConfig,
    fits: int,
    kinds: Sequence[str] = TRAINED_KINDS,
) -> dict[tuple[EvaluationSet, str], NDArray[np.bool_]]:
    """What is right after fits to examples: (fits, n) by evaluation set and part of the score.

    Args:
        method: a key of :data:`METHODS`.
        config: the score that is trained, and then evaluated.
        count, context, n, fit, fits: as :func:`adapted` takes them.
        kinds: negatives of the examples.
    """
    found: dict[tuple[EvaluationSet, str], list[NDArray[np.bool_]]] = {}
    for number in range(fits):
        matcher = Matcher(mini(context), config)
        shown = examples(count, number, kinds)
        matcher.fit(shown, method.split("+"), config=replace(fit, seed=number), progress=False)
        for each, parts in answers(matcher._scorer, context, n):
            for part, right in parts.items():
                found.setdefault((each, part), []).append(right)
    return {key: np.stack(answered) for key, answered in found.items()}


def mean_over_fits(name: str, each: EvaluationSet, right: NDArray[np.bool_], count: int, group: str) -> Figure:
    """The share right of a set by the name of its figure and group, from (fits, n) after `count` examples."""
    fits, n = right.shape
    sizes = {"examples": count, "fits": fits}
    return Figure(name, *interval(right), n, chance=_chance(each), sizes=sizes, group=group)


def slug(each: EvaluationSet) -> str:
    """A set's name as that of a group of the suite."""
    return each.name.replace(" ", "-")


def _chance(each: EvaluationSet) -> float:
    return 1 / (1 + len(each.kinds))
