"""Ways to score all of N images against all of M captions, from pair by pair to the Matcher, a saving at a time.

Each gives the official score (:mod:`dsd_fast.reference.matching`) and does the whole job at every call: images in,
(N, M) scores out. Up to :func:`unconditional_once` they are stock diffusers throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd_fast.bench.case import Side
from dsd_fast.matching import MatchConfig, Matcher, official_layers
from dsd_fast.models import Model
from dsd_fast.reference import inputs, matching
from dsd_fast.unet import Plan, UNetProgram
from dsd_fast.unet.stream import rows_at_once

# On a GPU the Matcher would take what is free; how many rows share a call is part of what is measured.
_CUDA_BUDGET = 8 << 30


class Job:
    """N images, M captions and T timesteps; what a rung needs that does not depend on them is made once.

    Args:
        model: SD 1.x or 2.x that predicts the noise.
        images: uint8 (height, width, 3) of the model's size.
        captions: texts.
        timesteps: a count on the official grid.
    """

    def __init__(
        self, model: Model, images: Sequence[NDArray[np.uint8]], captions: Sequence[str], timesteps: int
    ) -> None:
        self.model, self.images, self.captions, self.timesteps = model, images, captions, timesteps
        self.pipe = model.to_pipeline()
        self.steps = matching.official_timesteps(timesteps)
        program = UNetProgram(model.unet)
        self.plan = program.plan(scores=official_layers(program), noise_pred=True)
        budget = _CUDA_BUDGET if model.device.type == "cuda" else None
        self.matcher = Matcher(model, MatchConfig(timesteps=timesteps, official=True, memory_budget=budget))

    @property
    def pairs(self) -> int:
        """N · M."""
        return len(self.images) * len(self.captions)

    def side(self, name: str, run: Callable[[Job], Any], rows: int, batch: int) -> Side:
        """A rung as a side: ``rows`` of the network in all, ``batch`` in its largest call."""
        sizes = {"images": len(self.images), "captions": len(self.captions), "timesteps": len(self.steps), "rows": rows}
        return Side(name, lambda: run(self), batch, sizes)


def pair_by_pair(job: Job) -> Tensor:
    """The reference: for each pair the text encoder once, and the VAE and two rows at each timestep."""
    return matching.score(job.pipe, job.images, job.captions, timesteps=job.steps)


def vae_once(job: Job) -> Tensor:
    """Each image goes through the VAE once."""
    return matching.score(job.pipe, [], job.captions, timesteps=job.steps, latents=_clean(job))


@torch.no_grad()
def text_once(job: Job) -> Tensor:
    """And each caption goes through the text encoder once."""
    empty, texts = _texts(job)
    scores = torch.zeros(len(job.images), len(job.captions))
    for n, t, noised, noise in _noised(job):
        for m in range(len(texts)):
            attention, gain = matching.pair_terms(job.pipe.unet, noised, t, noise, empty, texts[m : m + 1])
            scores[n, m] += (attention + gain).item()
    return scores / len(job.steps)


@torch.no_grad()
def batched(job: Job) -> Tensor:
    """And all captions of an image at a timestep go through the network in one call, 2M rows."""
    empty, texts = _texts(job)
    scores = torch.zeros(len(job.images), len(job.captions))
    for n, t, noised, noise in _noised(job):
        attention, gain = matching.pair_terms(job.pipe.unet, _repeated(noised, len(texts)), t, noise, empty, texts)
        scores[n] += (attention + gain).cpu()
    return scores / len(job.steps)


@torch.no_grad()
def unconditional_once(job: Job) -> Tensor:
    """And the unconditional row is computed once for an image and timestep, M + 1 rows: plain batching at its best."""
    states = torch.cat(_texts(job))
    scores = torch.zeros(len(job.images), len(job.captions))
    for n, t, noised, noise in _noised(job):
        attention, errors = matching.row_terms(job.pipe.unet, _repeated(noised, len(states)), t, noise, states)
        scores[n] += _official(attention, errors).cpu()
    return scores / len(job.steps)


@torch.no_grad()
def by_plan(job: Job) -> Tensor:
    """The same rows by the plan: scores come from the attention itself, not from a second product beside it."""
    return _planned(job, job.plan, share=False, anew=True)


@torch.no_grad()
def keys_once(job: Job) -> Tensor:
    """And each text's keys and values are projected once, not at every call."""
    return _planned(job, job.plan, share=False)


@torch.no_grad()
def prefix_once(job: Job) -> Tensor:
    """And the layers before the first that reads text run once for an image and timestep, not once a row."""
    return _planned(job, job.plan, share=True)


def matcher(job: Job) -> Tensor:
    """And rows of several images and timesteps share a call, as the memory budget allows."""
    return job.matcher.score(job.images, job.captions)


def ladder(job: Job) -> list[Side]:
    """All rungs, in order."""
    images, captions, steps = len(job.images), len(job.captions), len(job.steps)
    calls = images * steps
    return [
        job.side("pair by pair", pair_by_pair, 2 * captions * calls, 2),
        job.side("VAE once per image", vae_once, 2 * captions * calls, 2),
        job.side("text encoder once per caption", text_once, 2 * captions * calls, 2),
        job.side("captions in one batch", batched, 2 * captions * calls, 2 * captions),
        job.side("unconditional row once", unconditional_once, (captions + 1) * calls, captions + 1),
        job.side("the same rows by the plan", by_plan, (captions + 1) * calls, captions + 1),
        job.side("text keys and values once", keys_once, (captions + 1) * calls, captions + 1),
        job.side("text-free layers once", prefix_once, (captions + 1) * calls, captions + 1),
        matcher_side(job),
    ]


def matcher_side(job: Job) -> Side:
    """The Matcher as a side."""
    rows = len(job.images) * len(job.steps) * (len(job.captions) + 1)
    side = job.model.image_size[0] // job.model.vae_scale_factor
    tokens, budget = int(job.pipe.tokenizer.model_max_length), job.matcher.config.memory_budget
    at_once = rows_at_once(job.plan, side, side, tokens, memory_budget=budget)
    return job.side("Matcher", matcher, rows, min(rows, at_once))


@torch.no_grad()
def attention_pair_by_pair(job: Job, sections: Sequence[str]) -> Tensor:
    """The attention term alone of some sections of the network, by the reference."""
    empty, texts = _texts(job)
    scores = torch.zeros(len(job.images), len(job.captions))
    for n, t, noised, noise in _noised(job):
        for m in range(len(texts)):
            terms = matching.pair_terms(job.pipe.unet, noised, t, noise, empty, texts[m : m + 1], sections=sections)
            scores[n, m] += terms[0].item()
    return scores / len(job.steps)


@torch.no_grad()
def attention_by_plan(job: Job, plan: Plan) -> Tensor:
    """The same by a plan that has these layers' scores, whatever else it runs."""
    return _planned(job, plan, share=True, noise_term=False)


def _planned(job: Job, plan: Plan, *, share: bool, noise_term: bool = True, anew: bool = False) -> Tensor:
    """The scores by calls of a plan; ``anew`` projects the texts' keys and values at every call."""
    states = torch.cat(_texts(job))
    rows, once = len(states), None if anew else plan.encode_text(states)
    scores = torch.zeros(len(job.images), len(job.captions))
    for n, t, noised, noise in _noised(job):
        text = plan.encode_text(states) if once is None else once
        if share:
            out = plan.run(noised, t, text, latent_index=[0] * rows, text_index=range(rows))
        else:
            out = plan.run(_repeated(noised, rows), t, text)
        attention = torch.stack([value.mean(1) for value in out.scores.values()]).mean(0)
        errors = torch.zeros_like(attention)
        if noise_term:
            assert out.noise_pred is not None
            errors = (noise - out.noise_pred).flatten(1).norm(dim=1)
        scores[n] += _official(attention, errors).cpu()
    return scores / len(job.steps)


def _official(attention: Tensor, errors: Tensor) -> Tensor:
    """(M,) scores at a timestep from M + 1 rows, the unconditional first."""
    return (attention[0] + attention[1:]) / 2 + errors[0] - errors[1:]


@torch.no_grad()
def _clean(job: Job) -> Tensor:
    """(N, C, h, w), in one call of the VAE."""
    return inputs.encode_images(job.pipe.vae, inputs.preprocess(job.pipe, job.images))


def _texts(job: Job) -> tuple[Tensor, Tensor]:
    """States of the empty text, (1, T, E), and of the captions, (M, T, E), in one call of the text encoder."""
    states = job.pipe.encode_prompt(["", *job.captions], job.model.device, 1, False)[0]
    return states[:1], states[1:]


def _noised(job: Job) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each image and timestep: the image's number, the timestep, (1, C, h, w) latents, (C, h, w) noise."""
    clean = _clean(job)
    alphas = job.pipe.scheduler.alphas_cumprod.to(clean)
    noise = torch.stack([inputs.draw_noise(0, k, tuple(clean.shape[1:])) for k in range(len(job.steps))]).to(clean)
    for n in range(len(clean)):
        for k, t in enumerate(job.steps):
            yield n, t, alphas[t].sqrt() * clean[n : n + 1] + (1 - alphas[t]).sqrt() * noise[k], noise[k]


def _repeated(latents: Tensor, rows: int) -> Tensor:
    return latents.expand(rows, -1, -1, -1).contiguous()
