"""A sum and its layer norm in plain torch: the oracle of the kernels, and the form that a compiler fuses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(sum, normed) as the public function returns them."""
    total = x if residual is None else x + residual
    if total.numel() == 0:
        return total, _affine(total, weight, bias).to(x.dtype)
    parameter = bias if weight is None else weight
    wide = total if parameter is None else total.to(parameter.dtype)
    # Autocast's layer norm answers in float32.
    return total, F.layer_norm(wide, wide.shape[-1:], weight, bias, eps).to(x.dtype)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum, normed, mean, rstd): sum (0,) without ``residual``; mean and rstd (...), float32 or float64."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x if residual is None else x + residual
    wide = total.to(real)
    if not x.numel():
        mean, rstd = wide.new_zeros(x.shape[:-1]), wide.new_zeros(x.shape[:-1])
    else:
        variance, mean = torch.var_mean(wide, dim=-1, correction=0)
        rstd = torch.rsqrt(variance + eps)
    normed = _affine((wide - mean[..., None]) * rstd[..., None], weight, bias).to(x.dtype)
    return (x.new_empty(0) if residual is None else total), normed, mean, rstd


def backward(
    dsum: Tensor | None,
    dnormed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias): dx (..., C), the others (C,) in the type of the arithmetic, or (0,) unless ``parameters``.

    With x̂ = (sum − mean)·rstd and g = dnormed·weight: dx = rstd·(g − mean(g) − x̂·mean(g·x̂)) + dsum, the means over C.
    """
    real, width = mean.dtype, total.shape[-1]
    hat = (total.to(real) - mean[..., None]) * rstd[..., None]
    dy = dnormed.to(real)
    g = dy if weight is None else dy * weight.to(real)
    dx = g
    if width:
        dx = rstd[..., None] * (g - g.mean(-1, keepdim=True) - hat * (g * hat).mean(-1, keepdim=True))
    if dsum is not None:
        dx = dx + dsum
    if not parameters:
        return dx.to(total.dtype), hat.new_empty(0), hat.new_empty(0)
    rows = (mean.numel(), width)
    return dx.to(total.dtype), (dy * hat).reshape(rows).sum(0), dy.reshape(rows).sum(0)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias
