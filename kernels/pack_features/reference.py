"""Feature maps into a buffer in plain torch: the oracle of the kernels, and the form for CPUs.

Arithmetic is float32 whatever the maps' type (float64 stays float64). One map at a time, so that what lies between its
reading and its writing stays in a CPU's caches, and the last of it is written to the buffer itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12
"""The least norm that is divided by, that of F.normalize."""


def pack_features(x: Tensor, out: Tensor, rows: Tensor, mode: str, normalize: bool) -> None:
    """out[rows[b]] = normalised(resized(x[b])), rounded to its type.

    Args:
        x: (B, C, h, w).
        out: (R, C, H, W).
        rows: (B,) int64.
        mode: "bilinear", "nearest", "area" or "max".
        normalize: whether each position is divided by its L2 norm over channels.
    """
    if not x.numel() or not out.numel():
        return
    for b, row in enumerate(rows.tolist()):
        y, target = resized(x[b : b + 1], (out.shape[2], out.shape[3]), mode), out[row : row + 1]
        if normalize:
            wide = torch.float64 if y.dtype == torch.float64 else torch.float32
            norm = torch.linalg.vector_norm(y, dim=1, keepdim=True, dtype=wide)
            # Divides in the wider type, whatever y's, and rounds as it writes.
            torch.div(y, norm.clamp_min_(EPS), out=target)
        else:
            target.copy_(y)


def resized(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(B, C, h, w) → (B, C, *size); x itself where it has that size, else float32, or float64 for float64."""
    if tuple(x.shape[2:]) == size:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    if mode == "max":
        pooled: Tensor = F.adaptive_max_pool2d(wide, size)
        return pooled
    return F.interpolate(wide, size, mode=mode, align_corners=False if mode == "bilinear" else None)
