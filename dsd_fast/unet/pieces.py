"""The layers of a network: one function or kernel each where the modules are what they seem, else the modules.

A module's call takes as long as many a product of a single row, so what is plainly torch's is computed by torch's
function; the memory-bound pieces are one kernel each on a GPU. Compilers are given the modules.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as every

from dsd_fast.kernels.add_layer_norm import add_layer_norm
from dsd_fast.kernels.geglu import geglu
from dsd_fast.kernels.group_norm_silu import group_norm_silu
from dsd_fast.unet.weights import untouched

# What torch ships, where nobody has put another forward on the class before this package was imported.
_FORWARD = {
    kind: kind.forward
    for kind in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.SiLU)
    if kind.forward.__module__ == kind.__module__
}
# Triton decides when it is imported whether its kernels run on a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def linear(x: Tensor, module: Any) -> Tensor:
    """(…, C) → (…, C'): what ``module``, most often a Linear, makes of x."""
    if _plain(module, nn.Linear):
        own = module._parameters
        return F.linear(x, own["weight"], own["bias"])
    result: Tensor = module(x)
    return result


def convolved(x: Tensor, module: Any) -> Tensor:
    """(B, C, h, w) → (B, C', h', w'): what ``module``, most often a Conv2d, makes of x."""
    if _plain(module, nn.Conv2d) and module.padding_mode == "zeros" and "_conv_forward" not in module.__dict__:
        own = module._parameters
        return torch.conv2d(
            x, own["weight"], own["bias"], module.stride, module.padding, module.dilation, module.groups
        )
    result: Tensor = module(x)
    return result


def layer_norm(x: Tensor, module: Any) -> Tensor:
    """(B, L, C): what ``module``, most often a LayerNorm, makes of x."""
    if _plain(module, nn.LayerNorm):
        own = module._parameters
        return torch.layer_norm(x, module.normalized_shape, own["weight"], own["bias"], module.eps)
    result: Tensor = module(x)
    return result


def norm_activate(x: Tensor, norm: Any, activation: Any = None, shift: Tensor | None = None) -> Tensor:
    """(B, C, h, w): activation(norm(x + shift)), norm a GroupNorm, activation a SiLU or None, shift (B, C)."""
    if _fuses(x) and _is(norm, nn.GroupNorm) and (activation is None or _is(activation, nn.SiLU)):
        return group_norm_silu(
            x, norm.weight, norm.bias, norm.num_groups, norm.eps, shift=shift, silu=activation is not None
        )
    if shift is not None:
        x = x + shift.view(*shift.shape, 1, 1)
    if _plain(norm, nn.GroupNorm):
        own = norm._parameters
        y = torch.group_norm(x, norm.num_groups, own["weight"], own["bias"], norm.eps)
    else:
        y = norm(x)
    if activation is None:
        return y
    return F.silu(y) if _plain(activation, nn.SiLU) else activation(y)


def add_norm(x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """x + residual, and norm of it, norm a LayerNorm; (B, L, C) each."""
    if _fuses(x) and _is(norm, nn.LayerNorm):
        return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
    total = x + residual
    return total, layer_norm(total, norm)


def gated(x: Tensor, module: Any) -> Tensor:
    """diffusers' GEGLU; its projection is called, so that adapters on it count."""
    if not untouched(module) or _path(module) != "diffusers.models.activations.GEGLU":
        result: Tensor = module(x)
        return result
    h = linear(x, module._modules["proj"])
    if _fuses(x):
        return geglu(h)
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


def side_by_side(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """What linear layers make of the same x, by one product; None where each must be called.

    Only in compiled code on a GPU: on a CPU it gains nothing. The weights are joined in every call: a joined copy that
    is kept would miss what is written to them past torch's notice, as PEFT does when it merges an adapter.
    """
    if not (_fuses(x) and torch.compiler.is_compiling()):
        return None
    if not all(_is(layer, nn.Linear) and layer.bias is None for layer in layers):
        return None
    joined = F.linear(x, torch.cat([layer.weight for layer in layers]))
    return torch.split(joined, [layer.out_features for layer in layers], dim=-1)


def dropped(x: Tensor, module: Any) -> Tensor:
    """A Dropout, without the call where its probability is 0; what else ``module`` is, most often a Linear."""
    return x if _is(module, nn.Dropout) and module.p == 0.0 else linear(x, module)


def _fuses(x: Tensor) -> bool:
    return x.is_cuda or INTERPRETED


def _is(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what ``kind`` does: no subclass (adapters' layers have the names of torch's)."""
    return type(module) is kind and untouched(module)


def _plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether torch's function of ``kind`` does what calling ``module`` does, in eager code."""
    return (
        type(module) is kind
        and kind.forward is _FORWARD.get(kind)
        and untouched(module)
        # A weight that was taken out, to be computed anew at each call.
        and len(module._parameters) == (0 if kind is nn.SiLU else 2)
        # Hooks on the modules of the whole process.
        and not (every._global_forward_hooks or every._global_forward_pre_hooks)
        and not (every._global_backward_hooks or every._global_backward_pre_hooks)
        and not torch.compiler.is_compiling()
    )


def _path(module: Any) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"
