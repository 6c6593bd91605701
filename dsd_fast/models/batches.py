"""Any number of images through the VAE, a few at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dsd_fast.models.bundle import Model

# Images in one call of the VAE, and its encoder's peak: so many float tensors of its first width at the image's size.
_BATCH = 8
_TENSORS = 6


def encode_within(model: Model, pixels: Sequence[Tensor], budget: int) -> Tensor:
    """Clean latents (n, C, h, w) of n images, each (3, height, width) in [−1, 1]; no gradients.

    Args:
        budget: bytes that the VAE's activations may take; one image may need more.
    """
    if not len(pixels):
        return torch.empty(0)
    per_image = _TENSORS * model.vae.config.block_out_channels[0] * pixels[0][0].numel() * 4
    batch = max(1, min(_BATCH, budget // per_image))
    with torch.no_grad():
        return torch.cat(
            [
                model.encode_images(torch.stack(list(pixels[start : start + batch])))
                for start in range(0, len(pixels), batch)
            ]
        )
