"""FLOP counts of the modules a UNet is made of: two per multiply-add, biases and activations not counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsd_fast.unet.step import Size, area


def base_layer(module: Any) -> Any:
    """The layer an adapter wraps; the module itself without one."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _adapters(module: Any) -> Iterator[tuple[Any, Any]]:
    """The (down, up) layers of the adapters that are active and not merged into the weight."""
    if hasattr(module, "lora_A") and not module.disable_adapters and not module.merged:
        for name in module.active_adapters:
            if name in module.lora_A:
                yield module.lora_A[name], module.lora_B[name]


def linear_flops(module: Any, positions: int) -> int:
    """A linear layer at ``positions`` positions, with its active LoRA."""
    layer = base_layer(module)
    total: int = 2 * positions * layer.in_features * layer.out_features
    for down, up in _adapters(module):
        total += 2 * positions * (down.in_features * down.out_features + up.in_features * up.out_features)
    return total


def conv_flops(module: Any, size: Size) -> int:
    """A convolution that writes an image of ``size``, with its active LoRA."""
    layer = base_layer(module)
    total = _conv(layer, size)
    for down, up in _adapters(module):
        total += _conv(down, size) + _conv(up, size)
    return total


def _conv(layer: Any, size: Size) -> int:
    kernel: int = layer.kernel_size[0] * layer.kernel_size[1]
    channels: int = layer.in_channels * layer.out_channels // layer.groups
    return 2 * area(size) * kernel * channels


def attention_flops(length: int, tokens: int, width: int) -> int:
    """q kᵀ and P v at ``length`` positions and ``tokens`` keys, ``width`` = H·D."""
    return 4 * length * tokens * width
