"""Noise schedules, reproducible noise, timestep grids, samplers and inversion."""

from dsd_fast.diffusion.ddim import CLEAN, Predict, ddim_step, denoise, inversion_grid, invert
from dsd_fast.diffusion.noise import RowNoise, noise
from dsd_fast.diffusion.sampling import (
    guidance_embedding,
    guided,
    img2img,
    last_calls,
    official_denoising,
    sample,
    scheduler_noised,
    scheduler_steps,
    scheduler_timesteps,
    within,
)
from dsd_fast.diffusion.schedule import NoiseSchedule
from dsd_fast.diffusion.schedulers import SAMPLERS, changed_in_place, fresh_scheduler, named_scheduler
from dsd_fast.diffusion.timesteps import img2img_timestep, official_timesteps, resolve_timesteps

__all__ = [
    "CLEAN",
    "SAMPLERS",
    "NoiseSchedule",
    "Predict",
    "RowNoise",
    "changed_in_place",
    "ddim_step",
    "denoise",
    "fresh_scheduler",
    "guidance_embedding",
    "guided",
    "img2img",
    "img2img_timestep",
    "inversion_grid",
    "invert",
    "last_calls",
    "named_scheduler",
    "noise",
    "official_denoising",
    "official_timesteps",
    "resolve_timesteps",
    "sample",
    "scheduler_noised",
    "scheduler_steps",
    "scheduler_timesteps",
    "within",
]
