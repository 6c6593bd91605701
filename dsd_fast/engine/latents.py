"""Noise by (seed, draw), and the noised latents that the network is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsd_fast.diffusion import NoiseSchedule, noise
from dsd_fast.kernels.common.host import as_tensor
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.kernels.noise_latents import noise_latents
from dsd_fast.unet import Output


@dataclass(frozen=True, eq=False)
class Noised:
    """P noised latents.

    Attributes:
        schedule: that they were noised by.
        latents: (P, C, h, w), z_t in the network's type.
        timesteps: (P,) int64 on the CPU.
        noise: (P, C, h, w), ε, float32 or more, where the latents are.
    """

    schedule: NoiseSchedule
    latents: Tensor
    timesteps: Tensor
    noise: Tensor

    @classmethod
    def grid(cls, schedule: NoiseSchedule, clean: Tensor, epsilon: Tensor, timesteps: Sequence[int]) -> Noised:
        """Noise every clean latent to every timestep, P = n·S, image by image.

        Args:
            clean: (n, C, h, w), or (n, S, C, h, w), one for each timestep, in the network's type.
            epsilon: (1 or n, S, C, h, w), each timestep's noise, any device.
        """
        images = len(clean)
        times = as_tensor(timesteps).repeat(images)
        epsilon = upload(epsilon, clean.device, torch.promote_types(clean.dtype, torch.float32))
        every = epsilon.expand(images, -1, -1, -1, -1).flatten(0, 1)  # (n·S, C, h, w)
        if clean.ndim == 5:
            return cls.rows(schedule, clean.flatten(0, 1), every, times)
        z = noised(schedule, clean, epsilon[:, :, None], timesteps).flatten(0, 2)  # (n·S, C, h, w)
        return cls(schedule, z, times, every)

    @classmethod
    def rows(cls, schedule: NoiseSchedule, clean: Tensor, epsilon: Tensor, timesteps: Tensor) -> Noised:
        """Noise (P, C, h, w) clean latents in the network's type, each with its own noise to its own timestep."""
        epsilon = upload(epsilon, clean.device, torch.promote_types(clean.dtype, torch.float32))
        return cls(schedule, schedule.add_noise(clean, epsilon, timesteps), timesteps, epsilon)

    def error(self, out: Output, rows: Tensor) -> Tensor:
        """Measure ‖ε − ε_θ‖ of a plan's noise predictions, (b,) float32 or more; differentiable.

        Args:
            out: with a noise prediction.
            rows: (b,) int64 on the CPU, the noised latent of each row of ``out``.
        """
        assert out.noise_pred is not None
        own = upload(rows, self.latents.device)
        epsilon = self.noise[own]
        predicted = self.schedule.to_epsilon(
            out.noise_pred.to(epsilon.dtype), self.latents[own].to(epsilon.dtype), self.timesteps[rows]
        )
        norms: Tensor = (epsilon - predicted).flatten(1).norm(dim=1)
        return norms


def draw_noise(seeds: Sequence[int], draws: int, shape: Sequence[int]) -> Tensor:
    """Draw the first noises of seeds, (len(seeds), draws, \\*shape) float32 on the CPU.

    Raises:
        ValueError: a seed that is no integer of 32 bits.
    """
    return torch.stack([torch.stack([noise(seed, draw, shape) for draw in range(draws)]) for seed in seeds])


def noised(
    schedule: NoiseSchedule, clean: Tensor, epsilon: Tensor, timesteps: Sequence[int], *, clean_at_zero: bool = False
) -> Tensor:
    """Noise latents: z_t = √ᾱ_t z₀ + √(1 − ᾱ_t) ε for every image, timestep and draw.

    Args:
        clean: (n, C, h, w).
        epsilon: (1 or n, 1 or S, D, C, h, w) floating point.
        timesteps: S of them.
        clean_at_zero: whether timestep 0 is the clean latent itself.

    Returns:
        (n, S, D, C, h, w) in the type of ``clean``.
    """
    signal, sigma = schedule.coefficients(timesteps)
    if clean_at_zero:
        zero = as_tensor(timesteps) == 0
        signal, sigma = signal.masked_fill(zero, 1.0), sigma.masked_fill(zero, 0.0)
    real = torch.promote_types(clean.dtype, torch.float32)
    epsilon, signal, sigma = (upload(value, clean.device, real) for value in (epsilon, signal, sigma))
    return noise_latents(clean, epsilon, signal, sigma)
