"""Latents noised at several timesteps with several draws in one pass; see README.md in this folder."""

from dsd_fast.kernels.noise_latents.op import noise_latents

__all__ = ["noise_latents"]
