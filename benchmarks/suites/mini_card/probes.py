"""What the UNet's activations tell about a picture, and how the prompt bends its prediction of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from benchmarks.mini.networks import preprocess
from dsd_fast.bench.case import Figure
from dsd_fast.diffusion import noise
from dsd_fast.models import Model
from dsd_fast.models.mini.digits import DIGIT_NAMES, EVALUATION, TRAINING, digit
from dsd_fast.models.mini.scenes import COLOURS, EVAL_SEED, SHAPES, scene
from dsd_fast.unet import UNetProgram

__all__ = ["LAYER", "PROBED", "activations", "content_shift", "probe", "reconstruction"]

LAYER = "up-level1-upsampler-out"
"""The output of `up_blocks[1]`, (96, 16, 16); the probe reads its mean and its maximum over positions.

An object covers a small part of a picture: the mean alone is mostly about the background.
"""

PROBED = ("colour", "shape", "digit")

PROBE_SEED = 700_000_000
"""First of the scenes that probes are fitted on."""

_AT_ONCE = 64


@torch.inference_mode()
def activations(model: Model, images: Sequence[NDArray[np.uint8]], timestep: int, first_seed: int = 0) -> Tensor:
    """Mean and maximum over positions of `LAYER` for the empty prompt, (N, 192) float32.

    Image k gets the noise of seed `first_seed` + k: with one noise for all a probe could learn that noise.
    """
    plan = UNetProgram(model.unet).plan(features=(LAYER,))
    text = plan.encode_text(model.encode_unconditional().states)
    rows = []
    for start in track(range(0, len(images), _AT_ONCE), f"activations, t = {timestep}", transient=True):
        some = np.stack(images[start : start + _AT_ONCE])
        latents = _latents(model, some)
        draws = torch.stack([noise(first_seed + start + k, 0, latents.shape[1:]) for k in range(len(some))])
        times = torch.full((len(some),), timestep, device=model.device)
        noised = model.schedule.add_noise(latents, draws.to(latents), times)
        zeros = torch.zeros(len(some), dtype=torch.long)
        out = plan.run(noised, times, text, latent_index=torch.arange(len(some)), text_index=zeros)
        found = out.features[LAYER].float()
        rows.append(torch.cat((found.mean((2, 3)), found.amax((2, 3))), 1).cpu())
    return torch.cat(rows)


def probe(model: Model, what: str, timestep: int, n: int, fitted: int = 10_000, floor: float | None = None) -> Figure:
    """Accuracy of a multinomial logistic regression on `activations`, fitted on `fitted` pictures, told on `n`.

    `what` is "colour" or "shape", of scenes with one object, or "digit": then all training digits and all evaluation
    digits, whatever `fitted` and `n`.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if what == "digit":
        sets = [
            [digit(index, seed) for index in span] for span, seed in ((TRAINING, PROBE_SEED), (EVALUATION, EVAL_SEED))
        ]
        labels = [[each.label for each in drawn] for drawn in sets]
        images = [[each.image for each in drawn] for drawn in sets]
        classes = len(DIGIT_NAMES)
    else:
        seeds = (range(PROBE_SEED, PROBE_SEED + fitted), range(EVAL_SEED, EVAL_SEED + n))
        scenes = [[scene(seed, objects=1) for seed in span] for span in seeds]
        names = list(COLOURS) if what == "colour" else list(SHAPES)
        labels = [[names.index(getattr(each.objects[0], what)) for each in drawn] for drawn in scenes]
        images = [[each.image for each in drawn] for drawn in scenes]
        classes = len(names)
    features = [
        activations(model, some, timestep, first).numpy() for some, first in zip(images, (0, 10**6), strict=True)
    ]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(features[0], labels[0])
    right = int((classifier.predict(features[1]) == np.asarray(labels[1])).sum())
    return Figure.share(
        f"linear probe, {what}, t = {timestep}",
        right,
        len(labels[1]),
        chance=1 / classes,
        floor=floor,
        sizes={"timestep": timestep},
    )


@torch.inference_mode()
def content_shift(model: Model, timestep: int, n: int) -> list[Figure]:
    """How far the one-step x̂₀ is from the picture, by the prompt it is predicted with.

    Mean squared error of the latents over `n` two-object evaluation scenes, with the true caption, no text, the first
    object only, and the caption with a wrong colour: the more the text says what is not there, the more the prediction
    leaves the picture. The interval is ± 1.96 standard errors.
    """
    plan = UNetProgram(model.unet).plan(noise_pred=True)
    errors: dict[str, list[Tensor]] = {name: [] for name in ("true caption", "no text", "first object", "wrong colour")}
    for start in track(range(0, n, _AT_ONCE), f"content shift, t = {timestep}", transient=True):
        drawn = [scene(EVAL_SEED + i, objects=2) for i in range(start, min(start + _AT_ONCE, n))]
        latents = _latents(model, np.stack([each.image for each in drawn]))
        draws = torch.stack([noise(start + k, 0, latents.shape[1:]) for k in range(len(drawn))]).to(latents)
        times = torch.full((len(drawn),), timestep, device=model.device)
        noised = model.schedule.add_noise(latents, draws, times)
        texts = {
            "true caption": [each.caption for each in drawn],
            "no text": [""] * len(drawn),
            "first object": [each.caption.split(f" {each.relation} ")[0] for each in drawn],
            "wrong colour": [each.negatives()["colour"] for each in drawn],
        }
        for name, prompts in texts.items():
            out = plan.run(noised, times, plan.encode_text(model.encode_prompts(prompts).states))
            assert out.noise_pred is not None
            predicted = model.schedule.to_original(out.noise_pred, noised, times)
            errors[name].append((predicted - latents).float().square().mean((1, 2, 3)).cpu())
    return [_mean(f"error of x0, {name}, t = {timestep}", torch.cat(some)) for name, some in errors.items()]


@torch.inference_mode()
def reconstruction(model: Model, n: int) -> Figure:
    """Peak signal-to-noise ratio in dB of evaluation scenes through the VAE, mean over `n` pictures."""
    ratios = []
    for start in range(0, n, _AT_ONCE):
        images = np.stack([scene(EVAL_SEED + i).image for i in range(start, min(start + _AT_ONCE, n))])
        pixels = preprocess(torch.from_numpy(images)).to(model.device)
        error = (model.decode_latents(model.encode_images(pixels)) - pixels).float().square().mean((1, 2, 3))
        ratios.append((10 * torch.log10(4 / error)).cpu())
    return _mean("VAE, signal to noise", torch.cat(ratios), unit="dB")


def _latents(model: Model, images: NDArray[np.uint8]) -> Tensor:
    return model.encode_images(preprocess(torch.from_numpy(images)).to(model.device))


def _mean(name: str, values: Tensor, unit: str = "mean squared error") -> Figure:
    values = values.double()
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    value = float(values.mean())
    return Figure(name, value, value - half, value + half, len(values), unit=unit)
