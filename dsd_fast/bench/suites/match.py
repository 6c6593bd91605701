"""Image–text matching: the Matcher beside the reference, where its speed comes from, and what its scores are worth."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsd_fast.bench.case import Case, Context, Figure, Group, Quality, Side, Suite, Work
from dsd_fast.bench.suites import match_rungs as rungs
from dsd_fast.bench.suites.match_rungs import Job
from dsd_fast.bench.suites.shared import (
    BFLOAT16_TOLERANCE,
    DTYPES,
    PREDICTION_TOLERANCE,
    middles,
    mini,
    of_types,
    relative,
    rivals,
)
from dsd_fast.bench.timing import quantile
from dsd_fast.diffusion import noise
from dsd_fast.matching import MatchConfig, Matcher, official_layers
from dsd_fast.models import Model
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from dsd_fast.unet import UNetProgram

SCORE_TOLERANCE = 1e-4
"""Scores hold differences of two norms of about √(4 · 16 · 16) = 32. A float32 prediction is off by some 1e-6 of its
norm, so each norm by 3e-5 at the most and the difference of two by 6e-5; the mean over timesteps adds nothing, and
log-sum-exps near 5 with the same relative error add a tenth of that."""

BFLOAT16_SCORE_TOLERANCE = 32 * BFLOAT16_TOLERANCE
"""Norms of about 32, of predictions that are off by that share, and at worst along what the norm is of."""

ROWS = (1, 2, 4, 8, 16, 32, 64)
KINDS = (("new scenes", False, (1, 2, 4, 8, 16)), ("held-out pairs", True, (4,)))
"""Of quality: what the scenes are, whether their pairs of colour and shape were held out, and counts of timesteps."""
SCENES = 1000

DTYPE_ROWS = (1, 4, 16, 64)
DTYPE_TIMESTEPS = 2
"""Of the scenes that types are compared on."""

# Scenes scored together when quality is measured.
_SCENES_AT_ONCE = 20

_SCORES = "largest difference of a score"
_PREDICTIONS = "largest relative difference of a prediction"


def _job(context: Context, images: int, captions: int, timesteps: int, dtype: str = "float32") -> Job:
    """The first evaluation scenes and their captions."""

    def make() -> Job:
        scenes = [scene(EVAL_SEED + i) for i in range(max(images, captions))]
        pictures, texts = [each.image for each in scenes[:images]], [each.caption for each in scenes[:captions]]
        return Job(mini(context, dtype), pictures, texts, timesteps)

    return context.shared(f"job of {images}, {captions}, {timesteps}, {dtype}", make)


def _right(job: Job, context: Context) -> Tensor:
    """The reference's scores of a job, computed once."""
    name = f"scores of {len(job.images)}, {len(job.captions)}, {job.timesteps}"
    return context.shared(name, lambda: rungs.pair_by_pair(job))


def _difference(result: Tensor, right: Tensor) -> float:
    return float((result - right).abs().max())


def _scores(job: Job, sides: list[Side], oracle: Callable[[], Any] | None) -> Work:
    return Work(
        sides=sides,
        difference=_difference,
        tolerance=SCORE_TOLERANCE,
        accuracy=_SCORES,
        oracle=oracle,
        oracle_name="the reference, pair by pair",
        item="pair",
        items=job.pairs,
    )


def _headline(context: Context) -> Work:
    job = _job(context, 16, 16, 4)
    rows = 2 * job.pairs * len(job.steps)

    def reference(job: Job) -> Tensor:
        # The oracle of the next case is this side's result; it is not computed twice.
        scores = rungs.pair_by_pair(job)
        context.shared(f"scores of {len(job.images)}, {len(job.captions)}, {job.timesteps}", lambda: scores)
        return scores

    return _scores(job, [job.side("pair by pair", reference, rows, 2), rungs.matcher_side(job)], None)


def _batched(context: Context) -> Work:
    job = _job(context, 16, 16, 4)
    rows = len(job.images) * len(job.steps) * (len(job.captions) + 1)
    name = "captions in one batch, stock diffusers"
    plain = job.side(name, rungs.unconditional_once, rows, len(job.captions) + 1)
    return _scores(job, [plain, rungs.matcher_side(job)], lambda: _right(job, context))


def _waterfall(context: Context) -> Work:
    job = _job(context, 2, 16, 4)
    return _scores(job, rungs.ladder(job), None)


def _stop_early(sections: tuple[str, ...], context: Context) -> Work:
    job = _job(context, 4, 16, 4)
    program = UNetProgram(job.model.unet)
    layers = [name for name in official_layers(program) if name.startswith(sections)]
    rows = len(job.images) * len(job.steps) * (len(job.captions) + 1)

    def side(name: str, noise_pred: bool) -> Side:
        plan = program.plan(scores=layers, noise_pred=noise_pred)
        return job.side(name, lambda job: rungs.attention_by_plan(job, plan), rows, len(job.captions) + 1)

    sides = [side("whole network", True), side("stop after the last layer that scores", False)]
    return _scores(job, sides, lambda: rungs.attention_pair_by_pair(job, sections))


def _given(model: Model, rows: int, one_latent: bool) -> tuple[Tensor, Tensor]:
    """Latents, one or as many as rows, and the rows' text states."""
    side = model.image_size[0] // model.vae_scale_factor
    draws = [noise(0, draw, (4, side, side)) for draw in range(1 if one_latent else rows)]
    with torch.no_grad():
        states = model.encode_prompts([scene(EVAL_SEED + i).caption for i in range(rows)]).states
    return torch.stack(draws).to(model.device, model.dtype), states


def _plan_side(model: Model, rows: int, one_latent: bool) -> Side:
    """A call of a plan for the noise prediction."""
    plan = UNetProgram(model.unet).plan(noise_pred=True)
    latents, states = _given(model, rows, one_latent)
    with torch.no_grad():
        text = plan.encode_text(states)

    @torch.no_grad()
    def run() -> Tensor | None:
        if one_latent:
            return plan.run(latents, 500, text, latent_index=[0] * rows, text_index=range(rows)).noise_pred
        return plan.run(latents, 500, plan.encode_text(states)).noise_pred

    return Side("plan, keys made before" if one_latent else "plan, keys made anew", run, rows, {"rows": rows})


def _latency(rows: int, one_latent: bool, context: Context) -> Work:
    """A call of the network for its noise prediction."""
    model = mini(context)
    latents, states = _given(model, rows, one_latent)
    repeated = latents.expand(rows, -1, -1, -1).contiguous()

    @torch.no_grad()
    def stock() -> Any:
        return model.unet(repeated, 500, encoder_hidden_states=states).sample

    return Work(
        sides=[Side("diffusers", stock, rows, {"rows": rows}), _plan_side(model, rows, one_latent)],
        difference=relative,
        tolerance=PREDICTION_TOLERANCE,
        accuracy=_PREDICTIONS,
        oracle_name="diffusers",
        item="row",
        items=rows,
    )


def _quality(kind: str, timesteps: int, held_out: bool, context: Context) -> list[Figure]:
    """How often the true caption has the highest score of three, and the seconds that a pair takes.

    On the official grid the only timestep of one would be nearly pure noise, so the middles of equal parts are taken.
    """
    answers, seconds = _answers(mini(context), timesteps, held_out)
    right = int((answers == 0).sum())
    return [_first(f"{kind}, T = {timesteps}", right, chance=1 / 3, timesteps=timesteps, seconds=seconds)]


def _first(name: str, right: int, *, timesteps: int, **rest: Any) -> Figure:
    return Figure.share(name, right, SCENES, sizes={"timesteps": timesteps}, item="pair", **rest)


def _answers(model: Model, timesteps: int, held_out: bool) -> tuple[Tensor, float]:
    """Which of its captions each scene puts first, (SCENES,), 0 the true one, −1 where two are; seconds of a pair."""
    matcher = Matcher(model, MatchConfig(timesteps=middles(timesteps)))
    first, seconds = [], []
    for start in range(0, SCENES, _SCENES_AT_ONCE):
        scenes = [scene(EVAL_SEED + i, held_out=held_out) for i in range(start, min(start + _SCENES_AT_ONCE, SCENES))]
        pairs = [(each.image, text) for each in scenes for text in (each.caption, *rivals(each).values())]
        begin = time.perf_counter()
        scores = matcher.predict(pairs).view(len(scenes), 3)
        seconds.append((time.perf_counter() - begin) / len(pairs))
        most, place = scores.max(1)
        first.append(place.where((scores == most[:, None]).sum(1) == 1, -1))
    return torch.cat(first), quantile(seconds, 0.5)


def _matcher_types(context: Context) -> Work:
    job = _job(context, 8, 16, 4)
    return of_types(
        lambda dtype: rungs.matcher_side(_job(context, 8, 16, 4, dtype)),
        difference=_difference,
        tolerance=BFLOAT16_SCORE_TOLERANCE,
        accuracy=_SCORES,
        item="pair",
        items=job.pairs,
    )


def _rows_types(rows: int, context: Context) -> Work:
    return of_types(
        lambda dtype: _plan_side(mini(context, dtype), rows, one_latent=False),
        difference=relative,
        tolerance=BFLOAT16_TOLERANCE,
        accuracy=_PREDICTIONS,
        item="row",
        items=rows,
    )


def _quality_types(context: Context) -> list[Figure]:
    """How often the true caption has the highest score of three in each type, and how often they agree."""
    (kind, held_out, _), t = KINDS[0], DTYPE_TIMESTEPS
    found = {dtype: _answers(mini(context, dtype), t, held_out) for dtype in DTYPES}
    figures = [
        _first(f"{kind}, {dtype}", int((first == 0).sum()), chance=1 / 3, timesteps=t, seconds=seconds)
        for dtype, (first, seconds) in found.items()
    ]
    one, other = (first for first, _ in found.values())
    return [*figures, _first(f"{kind}, the same answer in both", int((one == other).sum()), timesteps=t)]


suite = Suite(
    name="match",
    groups=[
        Group("headline", "16 images against 16 captions at 4 timesteps, the official score with its noise term"),
        Group("waterfall", "Where the speed comes from: 2 images, 16 captions, 4 timesteps", plot="waterfall"),
        Group("stop-early", "The attention term alone: the network stops after the last layer that scores"),
        Group("rows", "One call of the network, rows that share nothing", plot="latency"),
        Group("texts", "One call of the network, one noised latent with several texts", plot="latency"),
        Group(
            "dtype", "bfloat16 beside float32: a call of the network, and 8 images against 16 captions at 4 timesteps"
        ),
        Group(
            "dtype-quality",
            f"bfloat16 beside float32: the true caption against two nearly true ones at {DTYPE_TIMESTEPS} timesteps",
        ),
        Group("quality", "The true caption against two nearly true ones", plot="quality", x="timesteps"),
    ],
    cases=[
        Case("headline", "headline", _headline, repeats=6),
        Case("headline-batched", "headline", _batched),
        Case("waterfall", "waterfall", _waterfall),
        Case("stop-early/official-layers", "stop-early", partial(_stop_early, ("down", "mid", "up"))),
        Case("stop-early/middle-layer", "stop-early", partial(_stop_early, ("mid",))),
        *(Case(f"rows/{rows}", "rows", partial(_latency, rows, False), repeats=15) for rows in ROWS),
        *(Case(f"texts/{rows}", "texts", partial(_latency, rows, True), repeats=15) for rows in ROWS),
        *(Case(f"dtype/rows/{rows}", "dtype", partial(_rows_types, rows), repeats=9) for rows in DTYPE_ROWS),
        Case("dtype/matcher", "dtype", _matcher_types, repeats=6),
        Quality("dtype/quality", "dtype-quality", _quality_types),
        *(
            Quality(f"quality/{kind.replace(' ', '-')}/{count}", "quality", partial(_quality, kind, count, held_out))
            for kind, held_out, counts in KINDS
            for count in counts
        ),
    ],
)
