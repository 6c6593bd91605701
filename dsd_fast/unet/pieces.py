"""The layers of a network: one function or kernel each where the modules are what they seem, else the modules.

A module's call takes as long as many a product of a single row, so an eager run calls torch's functions where no module
has anything put on it. The memory-bound pieces are one kernel each on a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as every

from dsd_fast.kernels.add_layer_norm import add_layer_norm
from dsd_fast.kernels.common.elementwise import prefers_native
from dsd_fast.kernels.common.library import traced, untransformed
from dsd_fast.kernels.geglu import geglu
from dsd_fast.kernels.geglu.op import NAME as GATE
from dsd_fast.kernels.geglu.op import native as native_gate
from dsd_fast.kernels.group_norm_silu import group_norm_silu
from dsd_fast.kernels.group_norm_silu.op import NAME as NORM
from dsd_fast.kernels.group_norm_silu.op import native as native_norm
from dsd_fast.unet.shipped import is_shipped
from dsd_fast.unet.weights import Weights, untouched

# Triton decides when it is imported whether its kernels run on a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Layers:
    """What a run calls for the layers of a network.

    Args:
        direct: torch's functions for layers that are plainly torch's; only where nothing is put on any module, and not
            in code that a compiler reads, to which modules are no dearer and better known.
        native: the compiled library's for the memory-bound ones in float32; only on a CPU and without gradients.
    """

    def __init__(self, direct: bool, native: bool = False) -> None:
        self._direct, self._native = direct, native

    def linear(self, x: Tensor, module: Any) -> Tensor:
        """(…, C) → (…, C'): what ``module``, most often a Linear, makes of x."""
        if self._direct and type(module) is nn.Linear:
            own: Mapping[str, Any] = module._parameters
            return F.linear(x, own["weight"], own["bias"])
        result: Tensor = module(x)
        return result

    def convolved(self, x: Tensor, module: Any) -> Tensor:
        """(B, C, h, w) → (B, C', h', w'): what ``module``, most often a Conv2d, makes of x."""
        if self._direct and type(module) is nn.Conv2d and module.padding_mode == "zeros":
            own: Mapping[str, Any] = module._parameters
            padding: Any = module.padding
            return torch.conv2d(x, own["weight"], own["bias"], module.stride, padding, module.dilation, module.groups)
        result: Tensor = module(x)
        return result

    def layer_norm(self, x: Tensor, module: Any) -> Tensor:
        """(B, L, C): what ``module``, most often a LayerNorm, makes of x."""
        if self._direct and type(module) is nn.LayerNorm:
            own = module._parameters
            return torch.layer_norm(x, module.normalized_shape, own["weight"], own["bias"], module.eps)
        result: Tensor = module(x)
        return result

    def norm_activate(self, x: Tensor, norm: Any, activation: Any = None, shift: Tensor | None = None) -> Tensor:
        """(B, C, h, w): activation(norm(x + shift)), norm a GroupNorm, activation a SiLU or None, shift (B, C)."""
        if _fuses(x) and _is(norm, nn.GroupNorm) and (activation is None or _is(activation, nn.SiLU)):
            return group_norm_silu(
                x, norm.weight, norm.bias, norm.num_groups, norm.eps, shift=shift, silu=activation is not None
            )
        group = self._direct and type(norm) is nn.GroupNorm
        own = norm._parameters
        if group and self._native and (activation is None or type(activation) is nn.SiLU):
            tensors = (x, own["weight"], own["bias"], shift)
            if _single(*tensors) and x.is_contiguous(memory_format=torch.channels_last):
                return native_norm(*tensors, norm.num_groups, norm.eps, activation is not None)
        if shift is not None:
            x = x + shift.view(*shift.shape, 1, 1)
        x = torch.group_norm(x, norm.num_groups, own["weight"], own["bias"], norm.eps) if group else norm(x)
        if activation is None:
            return x
        return F.silu(x) if self._direct and type(activation) is nn.SiLU else activation(x)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        """x + residual, and norm of it, norm a LayerNorm; (B, L, C) each."""
        if _fuses(x) and _is(norm, nn.LayerNorm):
            return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
        total = x + residual
        return total, self.layer_norm(total, norm)

    def gated(self, x: Tensor, module: Any) -> Tensor:
        """diffusers' GEGLU; its projection is called, so that adapters on it count."""
        fuses = _fuses(x)
        kind: type = type(module)
        if not ((fuses and untouched(module)) or self._direct) or not _is_geglu(kind):
            result: Tensor = module(x)
            return result
        h = self.linear(x, module._modules["proj"])
        if fuses:
            return geglu(h)
        if self._native and h.dtype is torch.float32:
            return native_gate(h)
        value, gate = h.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def dropped(self, x: Tensor, module: Any) -> Tensor:
        """A Dropout, without the call where its probability is 0; what else ``module`` is, most often a Linear."""
        idle = type(module) is nn.Dropout and module.p == 0.0 and (self._direct or untouched(module))
        return x if idle else self.linear(x, module)


CALLED, _DIRECT, _NATIVE = Layers(False), Layers(True), Layers(True, True)


def layers_of(weights: Weights, device: torch.device) -> Layers:
    """The fastest for an eager run of a network now."""
    if traced() or not (_functions_serve() and weights.plain()):
        return CALLED
    if device.type == "cpu" and not torch.is_grad_enabled() and untransformed():
        return _NATIVE if prefers_native(NORM) and prefers_native(GATE) else _DIRECT
    return _DIRECT


def _functions_serve() -> bool:
    """Whether torch's functions do what its layers do in this process: none was replaced, no hook is on all modules."""
    hooks = (
        every._global_forward_hooks,
        every._global_forward_pre_hooks,
        every._global_backward_hooks,
        every._global_backward_pre_hooks,
    )
    return not any(hooks) and _SHIPPED and [getattr(kind, name) for kind, name in _METHODS] == _OWN


def side_by_side(x: Tensor, modules: Mapping[str, Any], names: Sequence[str]) -> tuple[Tensor, ...] | None:
    """What the linear layers of those names make of the same x, by one product; None where each must be called.

    Only in compiled code on a GPU: on a CPU it gains nothing. The weights are joined in every call: a joined copy that
    is kept would miss what is written to them past torch's notice, as PEFT does when it merges an adapter.
    """
    if not (_fuses(x) and traced()):
        return None
    layers = [modules[name] for name in names]
    if not all(_is(layer, nn.Linear) and layer.bias is None for layer in layers):
        return None
    joined = F.linear(x, torch.cat([layer.weight for layer in layers]))
    return torch.split(joined, [layer.out_features for layer in layers], dim=-1)


_KINDS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.SiLU, nn.Dropout)
_METHODS = [*((kind, name) for kind in _KINDS for name in ("forward", "__call__")), (nn.Conv2d, "_conv_forward")]
_OWN = [getattr(kind, name) for kind, name in _METHODS]
# Somebody may have put another method on one of these classes before this package was imported.
_SHIPPED = all(is_shipped(kind, name) for kind, name in _METHODS)


def _fuses(x: Tensor) -> bool:
    return x.is_cuda or INTERPRETED


def _is(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what ``kind`` does: no subclass (adapters' layers have the names of torch's)."""
    return type(module) is kind and untouched(module)


def _single(*tensors: Tensor | None) -> bool:
    return all(x is None or x.dtype is torch.float32 for x in tensors)


@functools.cache
def _is_geglu(kind: Any) -> bool:
    return f"{kind.__module__}.{kind.__qualname__}" == "diffusers.models.activations.GEGLU"
