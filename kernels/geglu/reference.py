"""GEGLU in plain torch: the oracle of the kernels, and the form that a compiler fuses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor) -> Tensor:
    """(..., N): value·gelu(gate) of x (..., 2N), the operations of diffusers' GEGLU."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """(..., 2N): the gradient of x from dy (..., N); float32 inside, float64 stays."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    value, gate = x.to(real).chunk(2, dim=-1)
    dy = dy.to(real)
    cdf = 0.5 * torch.erfc(gate * -math.sqrt(0.5))
    density = torch.exp(-0.5 * gate * gate) / math.sqrt(2.0 * math.pi)
    return torch.cat([dy * gate * cdf, dy * value * (cdf + gate * density)], dim=-1).to(x.dtype)
