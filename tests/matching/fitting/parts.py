"""Small groups, and the parts of a fit put together by hand."""

import copy
import math

import numpy as np
import torch

import dsd_fast as dsd
from dsd_fast.matching.fitting import loop
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.examples import Examples
from dsd_fast.matching.fitting.learned import Learned
from tests.tiny import tiny_pipeline

TEXTS = ["a red dog", "two cats on a blue mat", "a dog", "are you a cat"]
TIMES = [300, 700]
SIDE = 8


def pictures(count, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (40, 32, 3), dtype=np.uint8) for _ in range(count)]


def groups(seed=0):
    """One image with three texts, one text with two images, and one image with two texts."""
    images = pictures(4, seed)
    return [
        dsd.Group((images[0],), tuple(TEXTS[:3]), 1),
        dsd.Group((images[1], images[2]), (TEXTS[3],), 0),
        dsd.Group((images[3],), (TEXTS[2], TEXTS[0]), 1),
    ]


def pipeline(family="sd15", prediction_type="epsilon", dtype=torch.float32, seed=0):
    """A tiny pipeline on latents of 8 × 8."""
    pipe = tiny_pipeline(family, seed, prediction_type)
    pipe.to(dtype)
    pipe.unet.register_to_config(sample_size=SIDE)
    return pipe


def matcher(pipe, adapter=None, **settings):
    return dsd.Matcher(dsd.from_pipeline(pipe), dsd.MatchConfig(**({"timesteps": TIMES} | settings)), adapter=adapter)


def learned(pipe, methods=("lora",), fit=None, adapter=None, seed=0, **settings):
    """Parameters that hide nothing: of a fresh LoRA one factor is zero, and the gradient of the other with it."""
    own = matcher(pipe, adapter, **settings)
    made = Learned(own._scorer, None, methods, fit or FitConfig())
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.parameters.items():
        if name.startswith("lora"):
            parameter.data.copy_(
                0.3 / math.sqrt(parameter.shape[1]) * torch.randn(parameter.shape, generator=generator)
            )
    return made


def training(made, fit, examples=None, validation=None, folder=None, report=lambda *_: None):
    prepared = Examples(made.scorer, groups() if examples is None else examples)
    return loop.training(made, prepared, fit, validation, {}, folder, report)


def using(own, scorer):
    """A matcher that scores with that scorer."""
    other = copy.copy(own)
    other._scorer = scorer
    return other


def gradients(made):
    found = {name: parameter.grad.clone() for name, parameter in made.parameters.items() if parameter.grad is not None}
    for parameter in made.parameters.values():
        parameter.grad = None
    return found


def largest(found):
    return max(float(value.abs().max()) for value in found.values())
