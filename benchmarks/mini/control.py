"""The mini model's ControlNet, whose condition is Canny's edges of the picture: its training and its export."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor

from benchmarks.mini.loop import NoiseLoss, Recipe, average, fit, generator, made_once, rows, uniform
from benchmarks.mini.networks import preprocess
from benchmarks.mini.stages import example
from dsd_fast.images.canny import canny
from dsd_fast.models.bundle import Model

__all__ = ["build_control", "edges", "export_control", "train_control"]

DIGITS = 0.2
"""Share of digits among the training pictures."""


def build_control(model: Model, seed: int = 0) -> ControlNetModel:
    """An untrained ControlNet for the mini model's UNet, float32; its residuals are zero.

    Its encoder is the UNet's without the transformers, and starts from the UNet's weights: edges need no text, and
    without it the network is small and its residuals are the same for every prompt.
    """
    config = model.unet.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ControlNetModel(
            in_channels=config.in_channels,
            down_block_types=("DownBlock2D",) * len(config.block_out_channels),
            mid_block_type="UNetMidBlock2D",
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            cross_attention_dim=config.cross_attention_dim,
            attention_head_dim=tuple(config.attention_head_dim),
            # A halving less than there are entries: 64 × 64 pixels to the latents' 16 × 16.
            conditioning_embedding_out_channels=(16, 32, 64),
        )
    own, given = net.state_dict(), model.unet.state_dict()
    net.load_state_dict({key: value for key, value in given.items() if key in own}, strict=False)
    return net


def train_control(
    model: Model, net: ControlNetModel, recipe: Recipe, folder: Path, *, pictures: int = 16_384, **options: Any
) -> bool:
    """Trains `net` by the noise loss of the frozen UNet under its residuals (Zhang et al. 2023, equation 5).

    As there, half the captions are replaced by the empty one. Returns whether the training is complete.
    """
    data = made_once(folder / "control-cache.safetensors", pictures, lambda numbers: _ready(model, numbers))
    unet = model.unet
    unet.set_attn_processor(AttnProcessor())
    net.train().to(memory_format=torch.channels_last)
    noise_loss = NoiseLoss(DDPMScheduler.from_config(model.scheduler_config))
    captions = [example(seed, DIGITS).caption for seed in range(pictures)]
    texts = {caption: number for number, caption in enumerate(dict.fromkeys(["", *captions]))}
    numbers = torch.tensor([texts[caption] for caption in captions], device="cpu")
    with torch.no_grad():
        states = model.encode_prompts(list(texts)).states

    def loss(step: int) -> Tensor:
        random, order = generator(recipe.seed, step), rows(recipe, step, pictures)
        latents, condition = data["latents"][order].float(), unpacked(data["edges"][order])
        noised, timesteps, noise = noise_loss.draw(latents, random)
        text = states[torch.where(uniform(len(order), random) < 0.5, 0, numbers[order])]
        noised = noised.contiguous(memory_format=torch.channels_last)
        down, mid = net(noised, timesteps, text, condition, return_dict=False)
        predicted = unet(
            noised, timesteps, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        return noise_loss(predicted, noise, timesteps)

    return fit("control", dict(net.named_parameters()), loss, recipe, folder, **options)


def export_control(net: ControlNetModel, folder: Path, target: Path) -> int:
    """Writes the average that `train_control` left in `folder` as an fp16 ControlNet; returns its size in bytes."""
    net.load_state_dict(average(folder, "control"))
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        net.half().save_pretrained(work, safe_serialization=True)
        for file in Path(work).iterdir():
            os.replace(file, target / file.name)
    return sum(file.stat().st_size for file in target.iterdir())


def edges(image: np.ndarray) -> np.ndarray:
    """Canny's edges of a uint8 (64, 64, 3) picture, bool (64, 64)."""
    return np.asarray(canny(Image.fromarray(image)))[..., 0] > 0


def packed(edge_maps: list[np.ndarray]) -> Tensor:
    """N maps of `edges` as uint8 (N, 64, 8), a bit a pixel."""
    return torch.from_numpy(np.packbits(np.stack(edge_maps), axis=-1))


def unpacked(bits: Tensor) -> Tensor:
    """What `packed` gave as a ControlNet's condition, float32 (N, 3, 64, 64) of 0 and 1, a view of one channel."""
    maps = torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1)).float()
    return maps[:, None].expand(-1, 3, -1, -1)


def _ready(model: Model, numbers: range) -> dict[str, Tensor]:
    images = [example(seed, DIGITS).image for seed in numbers]
    latents = model.encode_images(preprocess(torch.from_numpy(np.stack(images)))).half()
    return {"latents": latents, "edges": packed([edges(image) for image in images])}
