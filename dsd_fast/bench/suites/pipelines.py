"""Stock pipelines of the published architectures, with random weights."""

from __future__ import annotations

from typing import Any

import torch

from dsd_fast.bench.case import Context
from dsd_fast.bench.suites.shared import mini
from dsd_fast.bench.suites.unet_networks import ARCHITECTURES, random_unet, random_weights

__all__ = ["random_pipeline"]

# The text encoders of runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-2-1-base, and the size that the
# config of their VAE names.
_TEXTS: dict[str, dict[str, Any]] = {
    "sd15": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "sd21-base": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
    },
}
_VAE_SIDES = {"sd15": 512, "sd21-base": 768}


def random_pipeline(name: str, context: Context, dtype: torch.dtype) -> Any:
    """A StableDiffusionPipeline of an architecture, weights drawn at the scale of trained ones.

    Args:
        name: "sd15" or "sd21-base".
        context: whose device it is made on. Tokenizer and scheduler are the mini model's.
        dtype: of the networks.

    Raises:
        UnavailableError: diffusers is not installed.
    """
    unet = random_unet(ARCHITECTURES[name], context.device)
    # Below the line that says so where it is missing.
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    small = mini(context).to_pipeline()
    with torch.device(context.device):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=_VAE_SIDES[name],
        )
        text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **_TEXTS[name]))
    for network in (vae, text):
        network.requires_grad_(False).eval()
        random_weights(network)
    pipe = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=small.tokenizer,
        scheduler=small.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe.to(dtype)
