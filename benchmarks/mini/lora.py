"""The mini model's LoRA: its training and its export.

A LoRA for features fits the model to the pictures of a task (Meng et al., arXiv 2410.06719, section 5.3): about 30 of
them, each with its caption and without, under the noise loss. The mini model knows its own scenes already, so here they
lie in the dark (`night`), as it has never seen them; captions, masks and keypoints stay true.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from peft import LoraConfig
from torch import Tensor
from torch.nn import Parameter

from benchmarks.mini.loop import NoiseLoss, Recipe, average, fit, generator, uniform
from benchmarks.mini.networks import preprocess
from dsd_fast.models.bundle import Model
from dsd_fast.models.lora import save_lora
from dsd_fast.models.mini.scenes import scene

__all__ = ["build_lora", "export_lora", "night", "train_lora"]

NAME = "mini"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
"""Attention and, as LoCon has it, the convolutions of the residual blocks."""

MOONLIGHT = np.array([0.6, 0.8, 1.1])
"""What is left of red, green and blue light at night, beside the exposure."""


def night(image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """A picture as a camera takes it at night: dark, bluish and noisy.

    Args:
        image: uint8 (64, 64, 3).
        seed: 0 or more, the scene's own; it draws the exposure, between 0.2 and 0.35, and the noise.

    Returns:
        uint8 (64, 64, 3).
    """
    rng = np.random.default_rng((seed, 4))
    exposure = rng.uniform(0.2, 0.35) * MOONLIGHT
    dark = exposure * image + 10 + rng.normal(0, 8, image.shape)
    return (np.clip(dark, 0, 255) + 0.5).astype(np.uint8)


def build_lora(model: Model, rank: int = 16, seed: int = 0) -> dict[str, Parameter]:
    """Adds an untrained LoRA, which changes nothing yet, to the model's UNet; returns its parameters by name.

    Its alpha is half its rank, as in the paper.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank / 2, target_modules=TARGETS), NAME)
    return {name: value for name, value in model.unet.named_parameters() if value.requires_grad}


def train_lora(
    model: Model,
    parameters: dict[str, Parameter],
    recipe: Recipe,
    folder: Path,
    *,
    pictures: int = 30,
    **options: Any,
) -> bool:
    """Trains the LoRA by the noise loss; a step has each picture's caption or none. Returns whether it is complete."""
    unet = model.unet
    unet.set_attn_processor(AttnProcessor())
    drawn = [scene(seed) for seed in range(pictures)]
    images = torch.from_numpy(np.stack([night(picture.image, picture.seed) for picture in drawn]))
    with torch.no_grad():
        clean = model.encode_images(preprocess(images))
        states = model.encode_prompts(["", *(picture.caption for picture in drawn)]).states
    noise_loss = NoiseLoss(DDPMScheduler.from_config(model.scheduler_config))

    def loss(step: int) -> Tensor:
        random = generator(recipe.seed, step)
        order = torch.randint(pictures, (recipe.batch,), generator=random, device="cpu")
        noised, timesteps, noise = noise_loss.draw(clean[order], random)
        text = states[torch.where(uniform(len(order), random) < 0.5, 0, order + 1)]
        return noise_loss(unet(noised, timesteps, text).sample, noise, timesteps)

    return fit("lora", parameters, loss, recipe, folder, **options)


@torch.no_grad()
def export_lora(model: Model, parameters: dict[str, Parameter], folder: Path, target: Path) -> int:
    """Writes the average that `train_lora` left in `folder` as an fp16 LoRA of diffusers; returns its size in bytes."""
    weights = average(folder, "lora")
    for name, value in parameters.items():
        value.data = weights[name].half()
    file = target / "pytorch_lora_weights.safetensors"
    save_lora(model.unet, NAME, file)
    return file.stat().st_size
