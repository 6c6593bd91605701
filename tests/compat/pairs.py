"""Pairs for the pipeline's tests, and parts of their scores computed on stock diffusers."""

import numpy as np
import torch

from dsd_fast.diffusion import noise
from dsd_fast.reference import matching as reference

PROMPTS = ["a red dog", "a cat", "the ball"]
TIMES = [40, 701]


def images(count, side=64, seed=0):
    """(count, 3, side, side) in [−1, 1], of 8-bit values."""
    generator = np.random.default_rng(seed)
    pixels = torch.from_numpy(generator.integers(0, 256, (count, 3, side, side), dtype=np.uint8))
    return 2 * (pixels / 255) - 1


def arrays(pixels):
    """The same images as uint8 arrays (height, width, 3)."""
    return [((image + 1) / 2 * 255).round().to(torch.uint8).permute(1, 2, 0).numpy() for image in pixels]


def states(pipe, text):
    """(1, 77, E) of the first text encoder."""
    ids = pipe.tokenizer([text], padding="max_length", max_length=77, return_tensors="pt").input_ids
    return pipe.text_encoder(ids)[0]


@torch.no_grad()
def noised(pipe, pixels, t, k, seed=0):
    """Noised latents of the images' posterior means at t, and their noise, the k-th of the seed."""
    clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    epsilon = noise(seed, k, clean.shape[1:])
    alpha = pipe.scheduler.alphas_cumprod[t]
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * epsilon, epsilon


@torch.no_grad()
def errors(pipe, pixels, text, t, k):
    """(N,) norms of the noise minus what the UNet predicts."""
    latents, epsilon = noised(pipe, pixels, t, k)
    predicted = pipe.unet(latents, t, states(pipe, text).expand(len(latents), -1, -1)).sample
    return (epsilon - predicted).flatten(1).norm(dim=1)


def official(pipe, pixels, **options):
    """(B,) scores of the pairs (PROMPTS[b], pixels[b]) by the plain reference, each alone."""
    options = {"timesteps": TIMES} | options
    scores = [
        reference.score(pipe, [image], [prompt], **options)[0]
        for image, prompt in zip(arrays(pixels), PROMPTS, strict=True)
    ]
    return torch.cat(scores)
