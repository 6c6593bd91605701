"""The memory-bound pieces of a network: one kernel each where the modules are what they seem, else the modules.

On a CPU the modules themselves are called: plain torch is what the operators would run there, behind more Python.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsd_fast.kernels.add_layer_norm import add_layer_norm
from dsd_fast.kernels.common.library import traced
from dsd_fast.kernels.geglu import geglu
from dsd_fast.kernels.group_norm_silu import group_norm_silu
from dsd_fast.unet.weights import untouched

# Triton decides when it is imported whether its kernels run on a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def norm_activate(x: Tensor, norm: Any, activation: Any = None, shift: Tensor | None = None) -> Tensor:
    """(B, C, h, w): activation(norm(x + shift)), norm a GroupNorm, activation a SiLU or None, shift (B, C)."""
    if _fuses(x) and _is(norm, nn.GroupNorm) and (activation is None or _is(activation, nn.SiLU)):
        return group_norm_silu(
            x, norm.weight, norm.bias, norm.num_groups, norm.eps, shift=shift, silu=activation is not None
        )
    y: Tensor = norm(x if shift is None else x + shift[:, :, None, None])
    return y if activation is None else activation(y)


def add_norm(x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """x + residual, and norm of it, norm a LayerNorm; (B, L, C) each."""
    if _fuses(x) and _is(norm, nn.LayerNorm):
        return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
    total = x + residual
    return total, norm(total)


def gated(x: Tensor, module: Any) -> Tensor:
    """diffusers' GEGLU; its projection is called, so that adapters on it count."""
    if _fuses(x) and untouched(module) and _path(module) == "diffusers.models.activations.GEGLU":
        return geglu(module.proj(x))
    result: Tensor = module(x)
    return result


def side_by_side(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """What linear layers make of the same x, by one product; None where each must be called.

    Only in compiled code on a GPU: on a CPU it gains nothing. The weights are joined in every call: a joined copy that
    is kept would miss what is written to them past torch's notice, as PEFT does when it merges an adapter.
    """
    if not (_fuses(x) and traced()):
        return None
    if not all(_is(layer, nn.Linear) and layer.bias is None for layer in layers):
        return None
    joined = F.linear(x, torch.cat([layer.weight for layer in layers]))
    return torch.split(joined, [layer.out_features for layer in layers], dim=-1)


def dropped(x: Tensor, module: Any) -> Tensor:
    """A Dropout, without the call where its probability is 0."""
    return x if _is(module, nn.Dropout) and module.p == 0.0 else module(x)


def _fuses(x: Tensor) -> bool:
    return x.is_cuda or INTERPRETED


def _is(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what ``kind`` does: no subclass (adapters' layers have the names of torch's)."""
    return type(module) is kind and untouched(module)


def _path(module: Any) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"
