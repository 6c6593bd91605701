"""AdamW for the vectors of many classes at once, each class at a step number of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsd_fast.class_tokens.config import TokenConfig

# torch's clip_grad_norm_ adds it to the norm.
_CLIP_EPS = 1e-6


def clipped(gradients: Sequence[Tensor], clip_norm: float | None) -> list[Tensor]:
    """Scale each class's gradient, (C, v, E) for each text encoder, to at most a norm over all encoders."""
    if clip_norm is None:
        return list(gradients)
    norms = torch.stack([each.flatten(1).norm(dim=1) for each in gradients]).norm(dim=0)  # (C,)
    factor = (clip_norm / (norms + _CLIP_EPS)).clamp(max=1.0)[:, None, None]
    return [each * factor for each in gradients]


def stepped(state: Tensor, gradient: Tensor, steps: Tensor, config: TokenConfig) -> Tensor:
    """Take a step of AdamW, as torch.optim.AdamW does (Loshchilov & Hutter 2019, "Decoupled Weight Decay", alg. 2).

    Args:
        state: (3, C, v, E): the vectors, and the running means of their gradients and of those squared.
        gradient: (C, v, E).
        steps: (C,) float64, the number of each class's step, from 1.
    """
    vectors, mean, square = state
    (beta1, beta2), rate = config.betas, config.learning_rate

    def of_classes(values: Tensor) -> Tensor:
        return values.to(gradient.dtype)[:, None, None]

    mean = mean.lerp(gradient, 1 - beta1)
    square = square * beta2 + gradient * gradient * (1 - beta2)
    spread = square.sqrt() / of_classes((1 - beta2**steps).sqrt()) + config.eps
    vectors = vectors * (1 - rate * config.weight_decay) - of_classes(rate / (1 - beta1**steps)) * (mean / spread)
    return torch.stack([vectors, mean, square])


def shortened(vectors: Tensor, most: float) -> Tensor:
    """Shorten vectors (…, E) to a norm of at most ``most``."""
    norms = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norms > most, vectors * (most / norms), vectors)
