"""The operators before and behind a network that is read at several timesteps, beside plain torch and the compiler's.

Latents are those of 512 × 512 pixels in SD 1.5, maps those of its three upper levels, channels-last.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.bench.case import Context, Work
from dsd_fast.bench.suites.judging import gradients
from dsd_fast.bench.suites.ops_elementwise import EAGER, LEVELS, ROWS, Piece, byte_count, forms, work
from dsd_fast.kernels.noise_latents import noise_latents
from dsd_fast.kernels.pack_features import pack_features

IMAGES, TIMESTEPS, DRAWS = 16, 8, 2
CHANNELS, SIDE = 4, 64

# Name of a size: how the maps are resized, and by which factor.
RESIZES = {"as-is": ("nearest", 1.0), "bilinear": ("bilinear", 2.0), "area": ("area", 0.5), "max": ("max", 0.5)}


def noise_forward(dtype: str, context: Context, images: int = IMAGES, side: int = SIDE) -> Work:
    """Latents noised at all timesteps with all draws, which all images share."""
    given = _noising(dtype, context.device, images, side)
    runs = {name: torch.no_grad()(partial(call, *given)) for name, call in forms(_NOISE, given).items()}
    truth, naive = (_plain_noise(*inputs) for inputs in ([each.double() for each in given], given))
    return work(runs, byte_count(given) + byte_count(naive), truth, naive, dtype, images)


def noise_backward(dtype: str, context: Context, images: int = IMAGES, side: int = SIDE) -> Work:
    """The gradients of latents and noise; the forward pass is not timed."""
    given = _noising(dtype, context.device, images, side)
    calls = forms(_NOISE, given)
    (noised,) = _plain_noise(*given)
    upstream = torch.randn(noised.shape, generator=torch.Generator().manual_seed(1)).to(noised)
    runs = {name: gradients(call, given, [upstream], leaves=2) for name, call in calls.items()}
    truth = gradients(_plain_noise, [each.double() for each in given], [upstream], leaves=2)()
    return work(runs, byte_count([upstream, *given]), truth, runs[EAGER](), dtype, images)


def pack(resize: str, level: str, normalize: bool, dtype: str, context: Context, rows: int = ROWS) -> Work:
    """Maps of a level into a buffer of their type, in another order."""
    mode, factor = RESIZES[resize]
    channels, side = LEVELS[level]
    generator, size = torch.Generator().manual_seed(0), (round(side * factor),) * 2
    x = torch.randn(rows, channels, side, side, generator=generator).to(context.device, getattr(torch, dtype))
    x, order = x.contiguous(memory_format=torch.channels_last), torch.arange(rows, device=context.device).flip(0)

    def plain(x: Tensor, order: Tensor, out: Tensor) -> Sequence[Tensor]:
        y = F.adaptive_max_pool2d(x, size) if mode == "max" else F.interpolate(x, size, mode=mode)
        out[order] = F.normalize(y, dim=1) if normalize else y
        return (out,)

    def ours(x: Tensor, order: Tensor, out: Tensor) -> Sequence[Tensor]:
        pack_features(x, out, order, mode=mode, normalize=normalize)
        return (out,)

    def given(kind: torch.dtype) -> list[Tensor]:
        return [x.to(kind), order, x.new_empty(rows, channels, *size, dtype=kind)]

    calls = forms(Piece(ours, plain, lambda *_: (), 1), given(x.dtype))
    runs = {name: torch.no_grad()(partial(call, *given(x.dtype))) for name, call in calls.items()}
    truth, naive = (plain(*given(kind)) for kind in (torch.float64, x.dtype))
    return work(runs, byte_count([x, *naive]), truth, naive, dtype, rows)


def _noise(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Sequence[Tensor]:
    return (noise_latents(latents, noise, signal, sigma),)


def _plain_noise(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Sequence[Tensor]:
    signal, sigma = (x[:, None, None, None, None] for x in (signal, sigma))
    return ((signal * latents[:, None, None] + sigma * noise).to(latents.dtype),)


_NOISE = Piece(_noise, _plain_noise, lambda *_: (), 2)


def _noising(dtype: str, device: str, images: int, side: int) -> list[Tensor]:
    """Latents, noise that all images and timesteps share, and the factors of timesteps over most of a schedule."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(images, CHANNELS, side, side, generator=generator).to(device, getattr(torch, dtype))
    noise = torch.randn(1, 1, DRAWS, CHANNELS, side, side, generator=generator).to(device)
    angle = torch.linspace(0.1, 1.5, TIMESTEPS)
    return [latents, noise, angle.cos().to(device), angle.sin().to(device)]
