"""Group norm with shift and SiLU in plain torch: the oracle of the kernels, and the form that a compiler fuses.

Letters: B images, C channels, G groups, D = C/G channels a group, L = h·w positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """Of the result for x (B, C, h, w): channels-last where x's channels are next to each other, else contiguous."""
    innermost = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if innermost else torch.contiguous_format


def group_norm_silu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> Tensor:
    """What the public function returns, by the operations of diffusers' ResnetBlock2D."""
    layout = memory_format(x)
    y = x if shift is None else x + shift[:, :, None, None]
    if y.numel():
        parameter = bias if weight is None else weight
        wide = y if parameter is None else y.to(parameter.dtype)
        # Autocast's group norm answers in float32.
        y = torch.group_norm(wide, groups, weight, bias, eps).to(x.dtype)
    else:
        # Torch's own kernels divide by the number of elements.
        y = _affine(y, weight, bias).to(x.dtype)
    # Torch's group norm answers contiguously on CUDA.
    return (F.silu(y) if silu else y).contiguous(memory_format=layout)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd): y (B, C, h, w) in x's type; mean and rstd (B, G), float32 or float64."""
    wide = _grouped(_shifted(x, shift), groups)
    if not x.numel():
        mean, rstd = wide.new_zeros((x.shape[0], groups)), wide.new_zeros((x.shape[0], groups))
    else:
        variance, mean = torch.var_mean(wide, dim=(2, 3, 4), correction=0)
        rstd = torch.rsqrt(variance + eps)
    u = _affine(_normalised(wide, mean, rstd).reshape(x.shape), weight, bias)
    return (F.silu(u) if silu else u).to(x.dtype), mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    groups: int,
    silu: bool,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dshift): (B, C, h, w), (C,), (C,), (B, C); the last three in the type of the arithmetic.

    With x̂ = (x + shift − mean)·rstd, u = x̂·weight + bias, du = dy·silu′(u) and g = du·weight:
    dx = rstd·(g − mean(g) − x̂·mean(g·x̂)), the means over a group; dweight = Σ du·x̂ and dbias = Σ du over images and
    positions, (0,) unless ``parameters``; dshift = Σ dx over positions, (0,) without ``shift``.
    """
    real = mean.dtype
    hat = _normalised(_grouped(_shifted(x, shift), groups), mean, rstd)
    flat = hat.reshape(x.shape)
    du = dy.to(real)
    if silu:
        u = _affine(flat, weight, bias)
        s = torch.sigmoid(u)
        du = du * (s + u * s * (1 - s))
    g = _grouped(_affine(du, weight, None), groups)
    dx = g
    if x.numel():
        means = (g.mean((2, 3, 4), keepdim=True), (g * hat).mean((2, 3, 4), keepdim=True))
        dx = rstd[:, :, None, None, None] * (g - means[0] - hat * means[1])
    dx = dx.reshape(x.shape)
    none = hat.new_empty(0)
    dweight, dbias = ((du * flat).sum((0, 2, 3)), du.sum((0, 2, 3))) if parameters else (none, none.clone())
    return dx.to(x.dtype), dweight, dbias, none.clone() if shift is None else dx.sum((2, 3))


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x if shift is None else x + shift[:, :, None, None]


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, C, h, w) → (B, G, D, h, w)."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x - mean[:, :, None, None, None]) * rstd[:, :, None, None, None]


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight[:, None, None]
    return x if bias is None else x + bias[:, None, None]
