"""Noise schedules, reproducible noise and timestep grids."""

from dsd_fast.diffusion.noise import noise
from dsd_fast.diffusion.schedule import NoiseSchedule
from dsd_fast.diffusion.timesteps import img2img_timestep, official_timesteps, resolve_timesteps, scheduler_from_config

__all__ = [
    "NoiseSchedule",
    "img2img_timestep",
    "noise",
    "official_timesteps",
    "resolve_timesteps",
    "scheduler_from_config",
]
