"""The real architectures with random weights: what a forward pass costs does not depend on what the weights know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsd_fast.bench.case import Context, UnavailableError
from dsd_fast.bench.suites.shared import mini

TOKENS = 77
TIMESTEP = 500

# Rows whose result is compared with float32's.
CHECKED = 2


@dataclass(frozen=True)
class Architecture:
    """A network by its published configuration.

    Attributes:
        config: arguments of diffusers' UNet2DConditionModel that are not its defaults.
        side: of the latents.
        pooled: width of the pooled text, 0 for networks that do not read it.
    """

    config: Mapping[str, Any]
    side: int
    pooled: int = 0


_SD = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}

ARCHITECTURES = {
    "sd15": Architecture({**_SD, "cross_attention_dim": 768, "attention_head_dim": 8}, 64),
    "sd21-base": Architecture(
        {**_SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}, 64
    ),
    "sdxl": Architecture(
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 1280,
        },
        128,
        1280,
    ),
}
"""By name: runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1-base, stabilityai's SDXL base 1.0."""


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


class Network:
    """A network of an architecture in the type that is measured, and what it is checked against.

    Attributes:
        architecture: its.
        device: "cpu", "cuda" or "cuda:N".
        dtype: of weights and inputs.
        unet: UNet2DConditionModel, in eval mode, with gradients off.
        truth: diffusers' own prediction for the first rows, computed in float32 from the same weights and inputs.
    """

    def __init__(self, architecture: Architecture, device: str, dtype: torch.dtype) -> None:
        self.architecture, self.device, self.dtype = architecture, device, dtype
        unet = random_unet(architecture, device)
        unet.to(dtype).float()
        self.truth = self.predict(unet, CHECKED)
        self.unet = unet.to(dtype)

    def inputs(self, rows: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Latents, text states, pooled states (None where they are not read) and time ids of the first rows."""
        width, side = self.architecture.config["cross_attention_dim"], self.architecture.side
        parts = []
        for row in range(rows):
            generator = torch.Generator().manual_seed(row)
            sizes = [(4, side, side), (TOKENS, width), (self.architecture.pooled,)]
            parts.append([torch.randn(size, generator=generator) for size in sizes])
        # Rounded to the type that is measured, so that the truth has the same inputs.
        latents, states, pooled = (
            torch.stack(part).to(self.device, self.dtype).to(dtype or self.dtype) for part in zip(*parts, strict=True)
        )
        pixels = 8.0 * side
        ids = torch.tensor([pixels, pixels, 0, 0, pixels, pixels], device=self.device)
        return latents, states, pooled if self.architecture.pooled else None, ids

    def call(self, rows: int, dtype: torch.dtype | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of diffusers' forward for the first rows."""
        latents, states, pooled, ids = self.inputs(rows, dtype)
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": ids.expand(rows, -1)}
        times = torch.full((rows,), TIMESTEP, device=self.device)
        return (latents, times, states), {"added_cond_kwargs": added, "return_dict": False}

    @torch.no_grad()
    def predict(self, unet: nn.Module, rows: int) -> Tensor:
        """diffusers' own forward of a network in its own type."""
        arguments, options = self.call(rows, next(unet.parameters()).dtype)
        prediction: Tensor = unet(*arguments, **options)[0]
        return prediction


def random_unet(architecture: Architecture, device: str) -> Any:
    """Makes a float32 UNet2DConditionModel with random weights, in eval mode, with gradients off.

    Raises:
        UnavailableError: diffusers is not installed.
    """
    try:
        from diffusers import UNet2DConditionModel
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise UnavailableError("diffusers is not installed") from error
    with torch.device(device):
        unet = UNet2DConditionModel(**architecture.config)
    unet.requires_grad_(False).eval()
    random_weights(unet)
    return unet


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


@torch.no_grad()
def random_weights(module: nn.Module, seed: int = 0) -> None:
    """Gives every parameter a random value of a trained one's scale: activations keep about unit variance."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def draw(parameter: Tensor, mean: float, std: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator, device=device) * std + mean)

    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            draw(child.weight, 0.0, child.weight[0].numel() ** -0.5)
        elif isinstance(child, nn.GroupNorm | nn.LayerNorm):
            draw(child.weight, 1.0, 0.1)
        else:
            continue
        if child.bias is not None:
            draw(child.bias, 0.0, 0.1)
