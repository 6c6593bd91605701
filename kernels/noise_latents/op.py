"""``dsd_fast::noise_latents``: the registered operator of the kernels, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsd_fast.kernels.common import backend, elementwise
from dsd_fast.kernels.common.autograd import check_transforms
from dsd_fast.kernels.common.library import operator, without_none
from dsd_fast.kernels.noise_latents import reference

NAME = "noise_latents"

DTYPES = (*backend.KERNEL_DTYPES, torch.float64)


def _forward(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    if not elementwise.runs_triton(latents.device.type, latents.dtype):
        return reference.forward(latents, noise, signal, sigma)
    from dsd_fast.kernels.noise_latents import kernel

    return kernel.forward(latents, noise, signal, sigma)


def _forward_fake(latents, noise, signal, sigma):
    return latents.new_empty((latents.shape[0], signal.shape[0], *noise.shape[2:]))


_FORWARD = operator(NAME, _forward, _forward_fake)


def _backward(
    dout: Tensor,
    signal: Tensor,
    sigma: Tensor,
    by_image: bool,
    by_timestep: bool,
    latents: bool = True,
    noise: bool = True,
) -> tuple[Tensor, Tensor]:
    options = (dout, signal, sigma, by_image, by_timestep)
    if elementwise.runs_triton(dout.device.type, dout.dtype):
        from dsd_fast.kernels.noise_latents import kernel

        found = kernel.backward(*options, latents=latents, noise=noise)
    else:
        found = reference.backward(*options, latents=latents, noise=noise)
    gradients: tuple[Tensor, Tensor] = without_none(found, (latents, noise), dout)
    return gradients


def _backward_fake(dout, signal, sigma, by_image, by_timestep, latents=True, noise=True):
    images, timesteps, draws, *latent = dout.shape
    shape = (images if by_image else 1, timesteps if by_timestep else 1, draws, *latent)
    return (
        dout.new_empty((images, *latent) if latents else (0,)),
        dout.new_empty(shape, dtype=signal.dtype) if noise else dout.new_empty(0),
    )


_BACKWARD = operator(f"{NAME}_backward", _backward, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    latents, noise, signal, sigma = inputs
    ctx.save_for_backward(signal, sigma)
    ctx.by_image, ctx.by_timestep = noise.shape[0] == latents.shape[0], noise.shape[1] == signal.shape[0]
    ctx.noise_type = noise.dtype


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    latents, noise, *_ = ctx.needs_input_grad
    dlatents, dnoise = _BACKWARD(dout, *ctx.saved_tensors, ctx.by_image, ctx.by_timestep, latents, noise)
    return dlatents if latents else None, dnoise.to(ctx.noise_type) if noise else None, None, None


torch.library.register_autograd(f"dsd_fast::{NAME}", _differentiate, setup_context=_setup_context)


def noise_latents(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """Every image's latents noised at every timestep with every draw, in one pass: z_t = √ᾱ_t z₀ + √(1 − ᾱ_t) ε.

    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 4. A signal of 1 and a sigma of 0 give the clean
    latents. Arithmetic is float32 for 16-bit and 32-bit latents, float64 for float64; the result is rounded once.
    Differentiable (once) in latents and noise. Every size may be 0.

    Args:
        latents: z₀, (N, C, h, w) float64, float32, bfloat16 or float16, any strides.
        noise: ε, (1 or N, 1 or S, D, C, h, w) of any of these types, any strides: D draws, the same for all images or
            each image's own, the same at all timesteps or each timestep's own.
        signal: √ᾱ_t of S timesteps, (S,) float32 (float64 with float64 latents), without a gradient.
        sigma: √(1 − ᾱ_t), like signal.

    Returns:
        (N, S, D, C, h, w), contiguous, in the type of the latents.

    Raises:
        ValueError: a shape, type or device that does not fit, by the argument's name.
        NotImplementedError: the kernels run, and a gradient is asked for by forward mode or by a transform of
            torch.func.
    """
    _check(latents, noise, signal, sigma)
    if elementwise.choose(NAME, latents.device.type, latents.dtype, fuses=False) == "reference":
        return reference.forward(latents, noise, signal, sigma)
    check_transforms(NAME, latents, noise)
    noised: Tensor = _FORWARD(latents, noise, signal, sigma)
    return noised


def _check(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> None:
    """What :func:`noise_latents` says of its arguments."""
    if latents.ndim != 4 or latents.dtype not in DTYPES:
        raise ValueError(f"latents: got {tuple(latents.shape)} {latents.dtype}, expected (N, C, h, w) floating point")
    real = torch.float64 if latents.dtype == torch.float64 else torch.float32
    for name, value in (("signal", signal), ("sigma", sigma)):
        if value.ndim != 1 or value.shape != signal.shape or value.dtype != real:
            raise ValueError(
                f"{name}: got {tuple(value.shape)} {value.dtype}, expected (S,) {real}, the same S for signal and sigma"
            )
        if value.requires_grad:
            raise ValueError(f"{name}: requires a gradient, expected a tensor without one")
    images, timesteps = latents.shape[0], signal.shape[0]
    if (
        noise.ndim != 6
        or noise.shape[0] not in (1, images)
        or noise.shape[1] not in (1, timesteps)
        or noise.shape[3:] != latents.shape[1:]
        or noise.dtype not in DTYPES
    ):
        expected = ", ".join(["D", *(str(size) for size in latents.shape[1:])])
        raise ValueError(
            f"noise: got {tuple(noise.shape)} {noise.dtype}, expected (1 or {images}, 1 or {timesteps}, {expected}) "
            "floating point"
        )
    for name, value in (("noise", noise), ("signal", signal), ("sigma", sigma)):
        if value.device != latents.device:
            raise ValueError(f"{name}: on {value.device}, expected {latents.device} like latents")
