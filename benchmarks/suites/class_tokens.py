"""What class tokens bring: pictures of a class that no word was given for, by a judge that is not the guide.

The guide, which tokens are learned from, and the judge are networks trained apart. What the guide says more than the
judge is how far the tokens have learned to please it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from torch import nn

from benchmarks.suites.generate_quality import drawn
from benchmarks.suites.guide import ATTRIBUTES, Attribute, guide
from benchmarks.suites.intervals import interval
from benchmarks.suites.mini_card.judge import Seen, judge, look
from dsd_fast.bench.case import Context, Figure, Group, Quality, Suite
from dsd_fast.bench.suites.shared import mini
from dsd_fast.class_tokens import ClassTokenLearner, TokenConfig
from dsd_fast.engine.guides import guide_of
from dsd_fast.generation import GenerateConfig, Sampler
from dsd_fast.models import Model

__all__ = [
    "AMBIGUOUS",
    "CONFIG",
    "GUIDANCE",
    "NO_WORD",
    "RUNS",
    "SAMPLER",
    "SEVERAL",
    "STEPS",
    "N",
    "Task",
    "ambiguous",
    "no_word",
    "shows",
    "suite",
]

N = 1000
"""Pictures of a figure at least, of all classes and runs together."""
RUNS = 3
"""Tokens are learned so many times, each with a seed of its own."""
STEPS, GUIDANCE, SAMPLER = 6, 3.0, "dpm++2m"
CLAMPS = (None, 2.5, 1.5)
NONE = "a"
"""The word that says nothing of a class."""
# Of a vocabulary's tokens that end a word.
_END = "</w>"
CONFIG = TokenConfig(
    class_name=False,
    # The guide's logits are tens: without a temperature its gradient says nothing of most classes.
    temperature=10.0,
    images=3,
    steps=STEPS,
    # As much as pictures need hides from most classes how their token would change them.
    guidance=1.5,
    scheduler=SAMPLER,
    gradient_steps=1,
    noise="fresh",
    learning_rate=0.05,
    norm_clamp=1.5,
    stopping="never",
    updates=32,
    keep="best",
)
SEVERAL: Mapping[str, int] = {"compared": 6, "restart_after": 8, "updates": 40}
"""Settings of tokens that begin as one of several words; with the images that those are compared by as many as 60
updates have."""
FIRST_SEED = 2_000_000
"""Of the pictures that are judged, in whose noise no token has been learned. The settings were chosen by other
noise, and by a run of seed 0, which is none of these runs."""


@dataclass(frozen=True)
class Task:
    """Classes that a prompt does not name, or not wholly.

    Attributes:
        template: the prompt, with a place for what says the class.
        attributes: that tell the classes apart, in the order of the words that say them.
        said: what the template says of all of them.
        guided: the attributes that the guide tells.
        several: whether tokens begin as one of several words; else as the word that says nothing.
    """

    template: str
    attributes: tuple[str, ...]
    said: Mapping[str, str]
    guided: tuple[str, ...]
    several: bool = False

    @property
    def classes(self) -> dict[str, dict[str, str]]:
        """The words that say a class → all attributes that its pictures should have."""
        values = product(*(ATTRIBUTES[name] for name in self.attributes))
        return {" ".join(each): {**dict(zip(self.attributes, each, strict=True)), **self.said} for each in values}

    def settings(self, model: Model) -> dict[str, Any]:
        """What tokens begin as."""
        return {**SEVERAL, "initial": self.initial(model)} if self.several else {"initial": NONE}

    def initial(self, model: Model) -> tuple[str, ...]:
        """The words of the vocabulary that are no part of a word that says a class."""
        words = (token[: -len(_END)] for token in sorted(model.tokenizers[0].get_vocab()) if token.endswith(_END))
        return tuple(word for word in words if len(word) > 1 and word.isalpha() and word not in " ".join(self.classes))


NO_WORD = {
    "shapes": Task("a red {}", ("shape",), {"colour": "red"}, ("colour", "shape")),
    "colours": Task("a {} circle", ("colour",), {"shape": "circle"}, ("colour", "shape"), several=True),
}
AMBIGUOUS = Task("a {} circle", ("size", "colour"), {"shape": "circle"}, tuple(ATTRIBUTES))
"""The prompt says one attribute of three."""


def no_word(
    name: str, task: Task, context: Context, *, n: int = N, runs: int = RUNS, config: TokenConfig = CONFIG
) -> list[Figure]:
    """How often a token in the place of a word that is never given makes pictures of its class; and the word itself."""
    bench = _Bench(task, context, n, runs)
    named = bench.pictures([bench.model] * runs, bench.texts("{}"))
    figures = bench.figures(f"{name}, the word itself", named)
    figures += bench.figures(f"{name}, no word", bench.pictures([bench.model] * runs, bench.texts(NONE)))
    settings = task.settings(bench.model)
    learned = [(clamp, settings) for clamp in CLAMPS]
    if task.several:
        learned.append((CLAMPS[-1], {**settings, "initial": NONE, "restart_after": None}))
    for number, (clamp, own) in enumerate(learned):
        row = f"{name}, token, " + ("no clamp" if clamp is None else f"clamp {clamp:g}")
        row += f', from "{NONE}" alone' if number == len(CLAMPS) else ""
        models, clamped = bench.learned(replace(config, norm_clamp=clamp, **own))
        answers = bench.pictures(models, bench.texts("<{}>"))
        figures += bench.figures(row, answers)
        share = interval(np.stack([answers[..., 0], named[..., 0]], -1), _of_the_second)
        figures.append(Figure(f"{row}: of the word's", *share, answers[..., 0].size, unit="ratio", sizes=bench.sizes))
        if clamp is not None:
            figures.append(Figure.share(f"{row}: held by the clamp", sum(clamped), len(clamped), sizes=bench.sizes))
    return figures


def ambiguous(
    name: str, task: Task, context: Context, *, n: int = N, runs: int = RUNS, config: TokenConfig = CONFIG
) -> list[Figure]:
    """How often a token makes pictures of its class where the prompt beside it says less than the class has."""
    bench = _Bench(task, context, n, runs)
    # Two attributes are not said: a vector for each.
    models, _ = bench.learned(replace(config, vectors=2))
    figures = []
    for guidance in (GUIDANCE, 1.0):
        rows = {
            "plain prompt": ([bench.model] * runs, bench.texts("")),
            "token": (models, bench.texts("<{}>")),
            "the words themselves": ([bench.model] * runs, bench.texts("{}")),
        }
        for row, drawing in rows.items():
            figures += bench.figures(f"{name}, guidance {guidance:g}, {row}", bench.pictures(*drawing, guidance))
    return figures


class _Bench:
    """What learns tokens for a task, and judges its pictures."""

    def __init__(self, task: Task, context: Context, n: int, runs: int) -> None:
        self.task, self.model, self.runs = task, mini(context), runs
        self.judge: nn.Module = context.shared("judge", lambda: judge(self.model.vae).to(self.model.device))
        network = Attribute(context.shared("guide", lambda: guide(self.model.vae)), *task.guided).eval()
        self.guide = guide_of(network, labels=network.labels, mean=(0.5,) * 3, std=(0.5,) * 3)
        self.outputs = [network.labels.index(" ".join(each[a] for a in task.guided)) for each in task.classes.values()]
        self.each = -(-n // (runs * len(task.classes)))
        self.sizes = {"steps": STEPS, "runs": runs}

    def texts(self, said: str) -> list[str]:
        """The prompt of each class, with its words or its token for the braces in what is said of it."""
        words = [said.replace("{}", name.replace(" ", "-") if "<" in said else name) for name in self.task.classes]
        return [" ".join(self.task.template.replace("{}", each).split()) for each in words]

    def learned(self, config: TokenConfig) -> tuple[list[Model], list[bool]]:
        """The model with each run's tokens, and which of all runs' tokens the clamp holds."""
        targets = dict(zip(self.task.classes, self.outputs, strict=True))
        models, clamped = [], []
        config = replace(config, templates=(self.task.template,))
        for run in track(range(self.runs), "tokens", transient=True):
            learner = ClassTokenLearner(self.model, self.guide, replace(config, seed=1 + run), targets=targets)
            tokens = learner.learn(list(self.task.classes))
            models.append(self.model.with_tokens(tokens))
            clamped += [bool(about["clamped"]) for about in tokens.about.values()]
        return models, clamped

    def pictures(self, models: Sequence[Model], texts: Sequence[str], guidance: float = GUIDANCE) -> NDArray[np.bool_]:
        """(runs, n, 2): whether the judge, and whether the guide, takes each picture for its class.

        All classes have the same noise; each run has its own.
        """
        config = GenerateConfig(steps=STEPS, guidance=guidance, scheduler=SAMPLER)
        wanted = list(self.task.classes.values()) * self.each
        outputs = np.array(self.outputs * self.each)
        found = []
        for run, model in enumerate(models):
            seeds = FIRST_SEED + run * self.each + np.arange(self.each).repeat(len(texts))
            images = drawn(Sampler(model, config), list(texts) * self.each, seeds.tolist())
            right = [shows(seen, asked) for seen, asked in zip(look(self.judge, images), wanted, strict=True)]
            found.append(np.stack([right, self.guide.of_images(list(images)).argmax(-1).numpy() == outputs], -1))
        return np.stack(found)

    def figures(self, name: str, right: NDArray[np.bool_]) -> list[Figure]:
        n, chance = right[..., 0].size, 1 / len(self.task.classes)
        return [
            Figure(f"{name}: {by}", *interval(right[..., place]), n, chance=chance, sizes=self.sizes)
            for place, by in enumerate(("judge", "guide"))
        ]


def shows(seen: Seen, asked: Mapping[str, str]) -> bool:
    """Whether there is one object, with all that is asked of it."""
    if len(seen.objects) != 1:
        return False
    ((colour, (shape, size)),) = seen.objects.items()
    return {"colour": colour, "shape": shape, "size": size}.items() >= asked.items()


def _of_the_second(means: NDArray[np.float64]) -> NDArray[np.float64]:
    ratios: NDArray[np.float64] = means[:, 0] / np.maximum(means[:, 1], np.finfo(np.float64).tiny)
    return ratios


suite = Suite(
    "class-tokens",
    groups=(
        Group(
            "no-word",
            f"A token in the place of a word that is never given: {N:,} pictures of one object, {SAMPLER}, {STEPS} "
            f"steps, guidance {GUIDANCE:g}, the mini model; the clamp is a multiple of the vocabulary's mean norm",
            columns=": ",
        ),
        Group(
            "ambiguous",
            "A prompt that says one attribute of a class that has three, with and without a token: "
            f"{N:,} pictures, {SAMPLER}, {STEPS} steps, the mini model",
            columns=": ",
        ),
    ),
    cases=(
        *(Quality(f"no-word/{name}", "no-word", partial(no_word, name, task)) for name, task in NO_WORD.items()),
        Quality("ambiguous/circles", "ambiguous", partial(ambiguous, "circles", AMBIGUOUS)),
    ),
)
