"""Noised latents in plain torch: the oracle of the kernels.

Letters: N images, S timesteps, D draws, C channels. Arithmetic is float32 whatever the latents' type (float64 stays
float64).
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """(N, S, D, C, h, w) contiguous, in the type of the latents: signal·latents + sigma·noise.

    Args:
        latents: (N, C, h, w).
        noise: (1|N, 1|S, D, C, h, w).
        signal, sigma: (S,), of the arithmetic's type.
    """
    real = signal.dtype
    clean = per_timestep(signal) * latents.to(real)[:, None, None]
    # One pass over what is as large as the result, and another where that is rounded.
    noised = torch.addcmul(clean, per_timestep(sigma), noise.to(real))
    return noised.to(latents.dtype).contiguous()


def backward(
    dout: Tensor,
    signal: Tensor,
    sigma: Tensor,
    by_image: bool,
    by_timestep: bool,
    *,
    latents: bool = True,
    noise: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of latents, in dout's type, and of noise, in the arithmetic's; None instead of what is not asked for.

    Args:
        dout: (N, S, D, C, h, w).
        signal, sigma: as in :func:`forward`.
        by_image, by_timestep: whether each image, each timestep, has its own noise.
    """
    dlatents = dnoise = None
    if latents:
        dlatents = (per_timestep(signal) * dout).sum((1, 2)).to(dout.dtype).contiguous()
    if noise:
        dnoise = per_timestep(sigma) * dout
        shared = [axis for axis, own in enumerate((by_image, by_timestep)) if not own]
        # A sum over no axis at all would be one over all of them.
        dnoise = (dnoise.sum(shared, keepdim=True) if shared else dnoise).contiguous()
    return dlatents, dnoise


def per_timestep(x: Tensor) -> Tensor:
    """(S,) as (S, 1, 1, 1, 1)."""
    return x[:, None, None, None, None]
