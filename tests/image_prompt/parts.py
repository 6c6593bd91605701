"""A tiny model whose text encoder is its CLIP's own, and pictures."""

from functools import cache

import numpy as np
import torch

import dsd_fast as dsd
from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter
from tests.tiny import tiny_clip, tiny_pipeline

SIDE = 8
CONFIG = ImagePromptConfig(captions=tuple(f"a {word} cat" for word in "abcdefgh"), cut=0.1)


def pipeline(dtype=torch.float64, family="sd15", prediction_type="epsilon"):
    """The stock pipeline and the CLIP."""
    pipe, clip = tiny_pipeline(family, prediction_type=prediction_type), tiny_clip()
    if family == "sd15":
        own = {name.removeprefix("text_model."): value for name, value in clip.text_model.state_dict().items()}
        theirs = pipe.text_encoder.state_dict()
        pipe.text_encoder.load_state_dict({name: own[name.removeprefix("text_model.")] for name in theirs})
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None), clip):
        if part is not None:
            part.to(dtype)
    pipe.unet.register_to_config(sample_size=SIDE)
    return pipe, clip


@cache
def converter(dtype=torch.float64, family="sd15"):
    pipe, clip = pipeline(dtype, family)
    config = CONFIG if family == "sd15" else ImagePromptConfig()
    return ImagePromptConverter(dsd.from_pipeline(pipe), clip, config)


def pictures(count, seed=0, side=20):
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return list(coarse.repeat(side // 4, 1).repeat(side // 4, 2))
