"""A tiny model, a linear guide, and settings of a few steps."""

from functools import cache

import torch

import dsd_fast as dsd
from dsd_fast.class_tokens import ClassTokenLearner, TokenConfig
from dsd_fast.engine.guides import Guide
from tests.tiny import tiny_pipeline, tiny_scheduler

SIDE = 8
NAMES = ["ring", "red_cat", "dog"]
CONFIG = TokenConfig(
    templates=("A photo of {}", "a {} dog", "one {}"),
    images=2,
    steps=2,
    guidance=3.0,
    learning_rate=0.01,
    weight_decay=0.1,
    norm_clamp=None,
    updates=3,
    stopping="never",
    keep="last",
    save_every=0,
)


def pipeline(family="sd15", dtype=torch.float64):
    """Its scheduler does not round to float32, as Euler's does."""
    pipe = tiny_pipeline(family)
    pipe.scheduler = tiny_scheduler("sd15")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            part.to(dtype)
    pipe.unet.register_to_config(sample_size=SIDE)
    return pipe


@cache
def model(family="sd15", dtype=torch.float64):
    return dsd.from_pipeline(pipeline(family, dtype))


class Linear(Guide):
    """A linear classifier of images, in the type of the images."""

    labels = None

    def __init__(self, pixels, outputs=3, scale=8.0, labels=None):
        self.count, self.labels = outputs, labels
        random = torch.Generator().manual_seed(5)
        self.weight = scale * torch.randn(pixels, outputs, generator=random, dtype=torch.float64) / pixels**0.5

    def logits(self, pixels):
        return (pixels.flatten(1) / 2) @ self.weight.to(pixels.dtype)

    def settings(self):
        return {"sum": float(self.weight.sum()), "labels": self.labels}


def guide(own, **options):
    return Linear(3 * (SIDE * own.vae_scale_factor) ** 2, **options)


def learn(config=CONFIG, names=NAMES, own=None, classifier=None, targets=(0, 1, 2), latents=None, **options):
    """Tokens and history of classes, of which each has the output at its place in NAMES."""
    own = own or model()
    targets = {name: targets[NAMES.index(name)] for name in names}
    learner = ClassTokenLearner(own, classifier or guide(own), config, targets=targets, latents=latents)
    return learner.learn(names, **options), learner.history


def stacked(tokens):
    """All vectors of each token, side by side."""
    return {
        token: torch.cat([each.flatten() for each in (own.values() if isinstance(own, dict) else [own])])
        for token, own in tokens.items()
    }
