"""Ways to extract features of N images at S timesteps, from call by call to the FeatureExtractor, a saving at a time.

Each gives the features of :mod:`dsd_fast.reference.features` and does the whole job at every call: images in, features
out. Up to :func:`images_together` they are stock diffusers throughout.

Letters: N images, S timesteps, B rows of one call of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsd_fast.bench.case import Side
from dsd_fast.features import FeatureExtractor
from dsd_fast.models import Model
from dsd_fast.reference import features, inputs
from dsd_fast.reference.features_tapping import as_pictures, tapping
from dsd_fast.unet import Plan, UNetProgram
from dsd_fast.unet.stream import rows_at_once

Features = dict[str, Tensor]

PROMPT = ""

# Rows of a call where stock diffusers is batched by hand; more gain nothing on a CPU.
BATCH = 32


class Job:
    """N images and S timesteps; what a rung needs that does not depend on them is made once.

    Args:
        model: SD 1.x or 2.x.
        images: uint8 (height, width, 3) of the model's size.
        timesteps: exactly these.
        layers: ids, or the name of a set.
        batch: rows of a call where stock diffusers is batched by hand.
    """

    def __init__(
        self,
        model: Model,
        images: Sequence[NDArray[np.uint8]],
        timesteps: Sequence[int],
        layers: str | Sequence[str] = "practical",
        batch: int = BATCH,
    ) -> None:
        self.model, self.images, self.timesteps, self.batch = model, images, timesteps, batch
        self.pipe = model.to_pipeline()
        self.extractor = FeatureExtractor(model, layers, timesteps)
        self.ids = list(self.extractor.layers)
        program = UNetProgram(model.unet)
        self.whole = program.plan(features=self.ids, noise_pred=True)
        self.short = program.plan(features=self.ids)

    @property
    def rows(self) -> int:
        """N · S, the rows of the network that the job needs."""
        return len(self.images) * len(self.timesteps)

    def side(self, name: str, run: Callable[[Job], Any], batch: int, **rest: Any) -> Side:
        """A rung as a side, with ``batch`` rows in its largest call."""
        sizes = {"images": len(self.images), "timesteps": len(self.timesteps), "rows": self.rows}
        return Side(name, lambda: run(self), batch, sizes, **rest)


def one_by_one(job: Job) -> Features:
    """The reference at the official batch: for each image and timestep the VAE and one row of the whole network."""
    return official(job, 1)


def official(job: Job, batch: int) -> Features:
    """The reference with ``batch`` images in a call."""
    return features.extract(
        job.pipe, job.images, layers=job.ids, timesteps=job.timesteps, prompts=PROMPT, batch_size=batch
    )


def vae_once(job: Job) -> Features:
    """Each image goes through the VAE once."""
    return features.extract(job.pipe, [], layers=job.ids, timesteps=job.timesteps, prompts=PROMPT, latents=_clean(job))


def timesteps_together(job: Job) -> Features:
    """And all timesteps of an image go through the network in one call, S rows."""
    return _stock(job, len(job.timesteps))


def images_together(job: Job) -> Features:
    """And several images share a call: plain batching at its best."""
    return _stock(job, job.batch)


@torch.no_grad()
def by_plan(job: Job) -> Features:
    """The same rows by the plan, still the whole network."""
    return _planned(job, job.whole, shared=False)


@torch.no_grad()
def text_once(job: Job) -> Features:
    """And the text's keys and values are projected once, not for each row."""
    return _planned(job, job.whole, shared=True)


@torch.no_grad()
def stop_early(job: Job) -> Features:
    """And nothing runs after the last layer."""
    return _planned(job, job.short, shared=True)


def extractor(job: Job) -> Features:
    """And the noising of all timesteps, and packing, in one pass each; as many rows share a call as memory allows."""
    return job.extractor.extract(job.images, PROMPT)


def ladder(job: Job) -> list[Side]:
    """All rungs, in order."""
    batch = min(job.batch, job.rows)
    return [
        job.side("one image and timestep a call", one_by_one, 1),
        job.side("VAE once per image", vae_once, 1),
        job.side("all timesteps in one call", timesteps_together, min(len(job.timesteps), job.rows)),
        job.side("several images in one call", images_together, batch),
        job.side("the same rows by the plan", by_plan, batch),
        job.side("text keys and values once", text_once, batch),
        job.side("stop after the last layer", stop_early, batch),
        extractor_side(job),
    ]


def extractor_side(job: Job, **rest: Any) -> Side:
    """The FeatureExtractor as a side."""
    at_once = rows_at_once(job.short, *job.extractor.latent_size, int(job.pipe.tokenizer.model_max_length))
    return job.side("FeatureExtractor", extractor, min(job.rows, at_once), **rest)


def difference(result: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """The largest difference of any feature, relative to the largest value of that feature; infinite if ids differ."""
    if result.keys() != right.keys():
        return float("inf")
    each = [(result[name].float() - value).abs().max() / value.abs().max() for name, value in right.items()]
    # Not max(), which a NaN passes unseen.
    return float(torch.stack(each).amax())


def relative_norm(result: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """The largest norm of a feature's difference, relative to the feature's norm; infinite if ids differ."""
    if result.keys() != right.keys():
        return float("inf")
    each = [(result[name].double() - value.double()).norm() / value.double().norm() for name, value in right.items()]
    return float(torch.stack(each).amax())


@torch.no_grad()
def _stock(job: Job, batch: int) -> Features:
    text, found = states(job), Rows(job)
    with tapping(job.pipe.unet, job.ids) as tapped:
        for rows, latents, times in batches(job, batch):
            tapped.clear()
            job.pipe.unet(latents, times, encoder_hidden_states=text.expand(len(latents), -1, -1))
            found.put(rows, as_pictures(tapped.features, job.extractor.latent_size))
    return found.features()


def _planned(job: Job, plan: Plan, *, shared: bool) -> Features:
    """By calls of a plan; unless ``shared`` each row projects the text's keys and values for itself."""
    text, found = states(job), Rows(job)
    once = plan.encode_text(text) if shared else None
    for rows, latents, times in batches(job, job.batch):
        count = len(latents)
        keys = plan.encode_text(text.expand(count, -1, -1)) if once is None else once
        out = plan.run(latents, times, keys, text_index=[0] * count if shared else None)
        found.put(rows, out.features)
    return found.features()


class Rows:
    """The result, filled some rows at a time; made when the first come."""

    def __init__(self, job: Job) -> None:
        self._job, self._held = job, dict[str, Tensor]()

    def put(self, rows: slice, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if name not in self._held:
                self._held[name] = torch.empty(
                    (self._job.rows, *value.shape[1:]), dtype=value.dtype, device=value.device
                )
            self._held[name][rows] = value

    def features(self) -> Features:
        shape = (len(self._job.images), len(self._job.timesteps))
        return {name: self._held[name].view(*shape, *self._held[name].shape[1:]) for name in self._job.ids}


@torch.no_grad()
def _clean(job: Job) -> Tensor:
    """(N, C, h, w), in one call of the VAE for every few images."""
    pixels = inputs.preprocess(job.pipe, job.images)
    return torch.cat([inputs.encode_images(job.pipe.vae, part) for part in torch.split(pixels, 8)])


def states(job: Job) -> Tensor:
    """(1, T, E), in one call of the text encoder."""
    found: Tensor = job.pipe.encode_prompt(PROMPT, job.model.device, 1, False)[0]
    return found


def batches(job: Job, batch: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows image by image, ``batch`` at a time: which, their noised latents (B, C, h, w), their timesteps (B,)."""
    clean = _clean(job)
    alphas = job.pipe.scheduler.alphas_cumprod.to(clean)[list(job.timesteps)]
    noise = inputs.draw_noise(0, 0, tuple(clean.shape[1:])).to(clean)
    alphas = alphas.view(1, -1, 1, 1, 1)
    noised = (alphas.sqrt() * clean[:, None] + (1 - alphas).sqrt() * noise).flatten(0, 1).to(job.model.dtype)
    times = torch.tensor(list(job.timesteps), device=clean.device).repeat(len(clean))
    for start in range(0, len(noised), batch):
        rows = slice(start, min(start + batch, len(noised)))
        yield rows, noised[rows], times[rows]
