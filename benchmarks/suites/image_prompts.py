"""What images as prompts keep: attributes of a reference that its variations show, by a judge that stands apart.

Between the prompt that says the attributes (the most there is) and another reference's variations (the least); a linear
probe of CLIP's own vector tells what is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.suites.class_tokens import GUIDANCE, SAMPLER, STEPS
from benchmarks.suites.generate_quality import drawn
from benchmarks.suites.guide import ATTRIBUTES
from benchmarks.suites.intervals import interval
from benchmarks.suites.mini_card.judge import Seen, judge, look
from dsd_fast.bench.case import Context, Figure, Group, Quality, Suite
from dsd_fast.bench.suites.shared import middles, mini
from dsd_fast.engine.clip import ClipSpace
from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.generation import GenerateConfig, Sampler
from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter, TuneConfig
from dsd_fast.image_prompt.config import INVERSES
from dsd_fast.matching import MatchConfig, Matcher
from dsd_fast.models import Model
from dsd_fast.models.mini.digits import EVALUATION, TRAINING, digit
from dsd_fast.models.mini.scenes import EVAL_SEED, scene

__all__ = ["DOMAINS", "SHOWN", "N", "References", "customized", "edited", "kept", "matched", "suite", "tuned"]

N = 1000
"""References of a figure at least; or pictures, where a reference has several."""
SHOWN = 100
"""Pictures of a domain that a converter is tuned to."""
SCENES = 50
FIRST_SEED = 3_000_000
"""Of the pictures that are judged. All settings were chosen by other noise, and on other scenes and handwriting."""
PROBE_SEED, TUNE_SEED = 700_000_000, 800_000_000
_TIMESTEPS = 4
# Deep prompts, drawn anew, move the vectors of this small tower more than so few pictures can make good.
TUNING = TuneConfig(prompt_tokens=0, learning_rate=3e-3)
CUSTOM = replace(TuneConfig.few(), prompt_tokens=0, learning_rate=3e-3)

Kept = NDArray[np.bool_]


@dataclass(frozen=True)
class References:
    """Pictures with what can be kept of them.

    Attributes:
        images: uint8 (64, 64, 3).
        captions: that say all attributes.
        attributes: of each picture, the values by name.
    """

    images: list[NDArray[np.uint8]]
    captions: list[str]
    attributes: list[dict[str, Any]]

    def rolled(self) -> References:
        """The same with each one's neighbour in its place."""
        return self[[*range(1, len(self.images)), 0]]

    def __getitem__(self, places: Sequence[int]) -> References:
        return References(
            [self.images[place] for place in places],
            [self.captions[place] for place in places],
            [self.attributes[place] for place in places],
        )

    def kept(self, found: Sequence[Seen]) -> Kept:
        """(n, attributes): which of them a picture of each shows."""
        rows = [[_shown(each).get(name) == x for name, x in own.items()] for each, own in self._with(found)]
        return np.array(rows)

    def _with(self, found: Sequence[Seen]) -> list[tuple[Seen, dict[str, Any]]]:
        return list(zip(found, self.attributes, strict=True))


def _shown(seen: Seen) -> dict[str, Any]:
    if len(seen.objects) != 1:
        return {"digit": seen.digit}
    ((colour, (shape, size)),) = seen.objects.items()
    return {"colour": colour, "shape": shape, "size": size}


def _objects(n: int, first: int, held_out: bool | None) -> References:
    items = [scene(first + number, objects=1, held_out=held_out) for number in range(n)]
    attributes = [{name: getattr(each.objects[0], name) for name in ATTRIBUTES} for each in items]
    return References([each.image for each in items], list(map(_text, attributes)), attributes)


def _text(said: dict[str, Any]) -> str:
    return f"a {said['size']} {said['colour']} {said['shape']}"


def _digits(n: int, first: int) -> References:
    span = EVALUATION if first >= EVAL_SEED else TRAINING
    items = [digit(span[number % len(span)], first + number // len(span)) for number in range(n)]
    return References(
        [each.image for each in items], [each.caption for each in items], [{"digit": each.label} for each in items]
    )


DOMAINS: dict[str, Callable[[int, int], References]] = {
    "scenes": partial(_objects, held_out=False),
    "held-out pairs": partial(_objects, held_out=True),
    "digits": _digits,
}
"""Pictures (n, first seed): one object; one in a pair that neither CLIP nor the UNet was trained on; a digit."""


def kept(name: str, context: Context, *, n: int = N) -> list[Figure]:
    """What variations keep by each inverse, beside the caption, and what a linear probe finds in CLIP's vector."""
    bench, references = _Bench(context), DOMAINS[name](n, EVAL_SEED)
    said = bench.judged(references, references.captions)
    converters = {each: ImagePromptConverter(bench.model, config=ImagePromptConfig(inverse=each)) for each in INVERSES}
    found = {each: bench.seen(made.convert(references.images)) for each, made in converters.items()}
    other = references.rolled().kept(found[INVERSES[0]])
    rows = {"caption": said, "its end's state in all places": bench.judged(references, bench.ends(references.captions))}
    rows |= {each: references.kept(seen) for each, seen in found.items()}
    figures = _rows(name, references, rows | {"another reference": other})
    figures += [_way(name, each, rows[each], said, other) for each in ("its end's state in all places", *INVERSES)]
    # All pairs: of those held out the colour alone would tell the shape.
    shown = _digits(3 * N, PROBE_SEED) if name == "digits" else _objects(3 * N, PROBE_SEED, None)
    return figures + bench.probed(name, converters[INVERSES[0]], references, shown)


def tuned(name: str, context: Context, *, n: int = N, shown: int = SHOWN, config: TuneConfig = TUNING) -> list[Figure]:
    """What variations keep before and after a converter is tuned to other pictures of the domain."""
    bench, references, pictures = _Bench(context), DOMAINS[name](n, EVAL_SEED), DOMAINS[name](shown, TUNE_SEED)
    before = ImagePromptConverter(bench.model)
    after = before.finetune(pictures.images, config, progress=False)
    rows = {
        "the caption": bench.judged(references, references.captions),
        "before": bench.judged(references, before.convert(references.images)),
        "tuned": bench.judged(references, after.convert(references.images), after.model),
    }
    sizes = {"pictures": shown, "updates": config.steps}
    of_left = _way(name, "tuned", rows["tuned"], rows["the caption"], rows["before"], "of what was left", **sizes)
    figures = [*_rows(name, references, rows), of_left, _gain(name, "tuned", rows["tuned"], rows["before"])]
    # As little as they teach a probe they teach the network.
    return figures + bench.probed(name, before, references, pictures)


def customized(context: Context, *, n: int = N, scenes: int = SCENES, config: TuneConfig = CUSTOM) -> list[Figure]:
    """What variations of one picture keep before and after a converter is tuned to that picture alone."""
    bench, each = _Bench(context), -(-n // scenes)
    before, name = ImagePromptConverter(bench.model), "one picture"
    rows: dict[str, list[Kept]] = {"before": [], "tuned": []}
    references = DOMAINS["scenes"](scenes, EVAL_SEED)
    for number in range(scenes):
        own = references[[number] * each]
        after = before.finetune(own.images[:1], config, progress=False)
        for row, by in (("before", before), ("tuned", after)):
            prompts = [by.convert(own.images[:1])[0]] * each
            rows[row].append(own.kept(bench.seen(prompts, by.model, FIRST_SEED + number * each)))
    # (variations, scenes, attributes): variations of a scene are no observations of their own.
    stacked = {row: np.stack(found, 1).mean(0) for row, found in rows.items()}
    figures = []
    for row, found in stacked.items():
        value = interval(found.mean(-1)[None])
        figures.append(
            Figure(f"{name}, {row}: attributes", *value, scenes, sizes={"variations": each, "updates": config.steps})
        )
    return [*figures, _gain(name, "tuned", stacked["tuned"], stacked["before"])]


def edited(context: Context, *, n: int = N) -> list[Figure]:
    """What an edit changes as it was asked to, and what it leaves as it was."""
    bench, references, figures = _Bench(context), DOMAINS["scenes"](n, EVAL_SEED), []
    converter = ImagePromptConverter(bench.model)
    draw = np.random.default_rng(0)
    for asked in ("colour", "size"):
        others = [[x for x in ATTRIBUTES[asked] if x != own[asked]] for own in references.attributes]
        wanted = [each[int(draw.integers(len(each)))] for each in others]
        changed = replace(
            references,
            attributes=[{**own, asked: new} for own, new in zip(references.attributes, wanted, strict=True)],
        )
        for alpha in (0.0, 0.6, 1.0):
            prompts = converter.edit(references.images, [f"a {new}" for new in wanted], alpha)
            right, place = bench.judged(changed, prompts), list(ATTRIBUTES).index(asked)
            row = f"another {asked} asked, alpha {alpha:g}"
            figures.append(Figure.share(f"{row}: changed as asked", int(right[:, place].sum()), n))
            rest = np.delete(right, place, 1).mean(1)
            figures.append(Figure(f"{row}: of the rest kept", *interval(rest[None]), n))
    return figures


def matched(context: Context, *, n: int = N) -> list[Figure]:
    """Which of two pictures is like a reference: one with its attributes, the other with one that differs."""
    bench, draw = _Bench(context), np.random.default_rng(0)
    references = DOMAINS["scenes"](n, EVAL_SEED)
    pool: dict[str, list[NDArray[np.uint8]]] = {}
    candidates = DOMAINS["scenes"](4 * N, EVAL_SEED + N)
    for image, text in zip(candidates.images, candidates.captions, strict=True):
        pool.setdefault(text, []).append(image)
    pairs, kinds = [], []
    for text, own in zip(references.captions, references.attributes, strict=True):
        name = tuple(ATTRIBUTES)[int(draw.integers(len(ATTRIBUTES)))]
        near = [{**own, name: x} for x in ATTRIBUTES[name] if x != own[name]]
        told = [each for each in map(_text, near) if each in pool]
        other = told[int(draw.integers(len(told)))]
        kinds.append(name)
        pairs.append([pool[each][int(draw.integers(len(pool[each])))] for each in (text, other)])
    matcher = Matcher(bench.model, MatchConfig(timesteps=middles(_TIMESTEPS), attention_weight=0))
    prompts = ImagePromptConverter(bench.model).convert(references.images)
    space = ClipSpace(bench.model, resize="crop")
    wanted, both = space.of_images(references.images), space.of_images([each for pair in pairs for each in pair])
    found = {
        "image prompts": _scores(matcher, pairs, list(prompts)),
        "captions": _scores(matcher, pairs, references.captions),
        "CLIP's cosine of images": (both.view(n, 2, -1) @ wanted[:, :, None])[..., 0].numpy(),
        "CLIP's cosine of captions": (both.view(n, 2, -1) @ space.of_texts(references.captions)[:, :, None])[
            ..., 0
        ].numpy(),
    }
    z = [x / x.std() for x in (found["image prompts"], found["CLIP's cosine of images"])]
    found["image prompts and CLIP's cosine"] = z[0] + z[1]
    figures, of_kind = [], np.array(kinds)
    for row, scores in found.items():
        right = scores[:, 0] > scores[:, 1]
        figures.append(Figure.share(f"{row}: all", int(right.sum()), n, chance=0.5))
        for kind in ATTRIBUTES:
            own_kind = right[of_kind == kind]
            figures.append(Figure.share(f"{row}: {kind}", int(own_kind.sum()), len(own_kind), chance=0.5))
    return figures


class _Bench:
    """What draws pictures and judges them."""

    def __init__(self, context: Context) -> None:
        self.model = mini(context)
        self.judge: nn.Module = context.shared("judge", lambda: judge(self.model.vae).to(self.model.device))

    def seen(self, prompts: Any, model: Model | None = None, first: int = FIRST_SEED) -> list[Seen]:
        """What a picture of each prompt shows; all prompts of a place have the same noise."""
        config = GenerateConfig(steps=STEPS, guidance=GUIDANCE, scheduler=SAMPLER)
        prompts = list(prompts)
        seeds = list(range(first, first + len(prompts)))
        return look(self.judge, drawn(Sampler(model or self.model, config), prompts, seeds))

    def judged(self, references: References, prompts: Any, model: Model | None = None) -> Kept:
        return references.kept(self.seen(prompts, model))

    def ends(self, captions: Sequence[str]) -> ImagePrompt:
        """Captions by their end's state alone: the best vector that an image could be given."""
        converter, encoded = ImagePromptConverter(self.model), self.model.encode_prompts(captions)
        places = torch.arange(len(captions), device="cpu")
        vectors = encoded.states[places, encoded.lengths - 1]
        empty = converter.prompt_of(vectors)
        return replace(empty, vectors=vectors)

    @torch.no_grad()
    def probed(
        self, name: str, converter: ImagePromptConverter, references: References, shown: References
    ) -> list[Figure]:
        """What a logistic regression on the pictures that are shown finds in CLIP's vector of the references."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        fitted, asked = (_pooled(converter, each.images) for each in (shown, references))
        right = []
        for attribute in references.attributes[0]:
            values, wanted = ([each[attribute] for each in x.attributes] for x in (shown, references))
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(fitted, values)
            right.append(probe.predict(asked) == np.array(wanted))
        row = f"linear probe of CLIP's vector, of {len(shown.images):,} pictures"
        return _rows(name, references, {row: np.stack(right, 1)})


def _pooled(converter: ImagePromptConverter, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    prepared = torch.split(converter.preprocessing.of_images(images), converter.config.batch)
    return torch.cat([converter.pooled(each) for each in prepared]).cpu().numpy()


def _scores(matcher: Matcher, pairs: Sequence[Sequence[Any]], prompts: Sequence[Any]) -> NDArray[np.float32]:
    asked = [(image, prompt) for pair, prompt in zip(pairs, prompts, strict=True) for image in pair]
    return matcher.predict(asked).numpy().reshape(len(pairs), 2)


def _rows(name: str, references: References, rows: dict[str, Kept]) -> list[Figure]:
    figures, named = [], list(references.attributes[0])
    for row, right in rows.items():
        n = len(right)
        figures.append(Figure(f"{name}, {row}: attributes", *interval(right.mean(1)[None]), n))
        if len(named) > 1:
            columns = {**dict(zip(named, right.T, strict=True)), "all of them": right.all(1)}
            figures += [Figure.share(f"{name}, {row}: {each}", int(x.sum()), n) for each, x in columns.items()]
    return figures


def _way(name: str, row: str, right: Kept, most: Kept, least: Kept, column: str = "of the way", **sizes: int) -> Figure:
    """How much of what lies between the least and the most is reached."""
    stacked = np.stack([each.mean(1) for each in (right, most, least)], -1)[None]

    def part(means: NDArray[np.float64]) -> NDArray[np.float64]:
        between = np.maximum(means[:, 1] - means[:, 2], np.finfo(np.float64).tiny)
        reached: NDArray[np.float64] = (means[:, 0] - means[:, 2]) / between
        return reached

    return Figure(f"{name}, {row}: {column}", *interval(stacked, part), len(right), unit="ratio", sizes=sizes)


def _gain(name: str, row: str, after: NDArray[Any], before: NDArray[Any]) -> Figure:
    difference = after.mean(-1) - before.mean(-1)
    return Figure(f"{name}, {row}: more than before", *interval(difference[None]), len(after), unit="difference")


suite = Suite(
    "image-prompts",
    groups=(
        Group(
            "kept",
            f"Attributes of a reference that its variations keep, by the judge: {N:,} references, {SAMPLER}, {STEPS} "
            f"steps, guidance {GUIDANCE:g}, the mini model; the way is that from another reference to the caption",
            columns=": ",
        ),
        Group("tuned", f"What tuning to {SHOWN} pictures, or to one, adds", columns=": "),
        Group("edited", f"Variations under a prompt that asks for another attribute: {N:,} references", columns=": "),
        Group(
            "matched",
            f"Which of two pictures is like a reference: {N:,} references, {_TIMESTEPS} timesteps, the mini model",
            columns=": ",
        ),
    ),
    cases=(
        *(Quality(f"kept/{name.replace(' ', '-')}", "kept", partial(kept, name)) for name in DOMAINS),
        *(Quality(f"tuned/{name.replace(' ', '-')}", "tuned", partial(tuned, name)) for name in DOMAINS),
        Quality("tuned/one-picture", "tuned", customized),
        Quality("edited", "edited", edited),
        Quality("matched", "matched", matched),
    ),
)
