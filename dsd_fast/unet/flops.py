"""FLOP counts of the modules a UNet is made of: two per multiply-add, biases and activations not counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsd_fast.models.tuners import is_wrapper
from dsd_fast.unet.adapters import acting, stack
from dsd_fast.unet.step import Size, area


def base_layer(module: Any) -> Any:
    """The layer an adapter wraps; the module itself without one."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _adapters(module: Any) -> Iterator[tuple[Any, Any]]:
    """The (down, up) layers of the adapters that act; those that only multiply values one by one count as nothing.

    Raises:
        ValueError: an adapter of a kind whose cost is not known.
    """
    for layer in stack(module):
        # A module that replaces another costs what base_layer, which looks through to it, does.
        for name in () if is_wrapper(layer) else acting(layer):
            kind = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
            if kind == "lora" and name in layer.lora_A and name not in layer.lora_variant:
                yield layer.lora_A[name], layer.lora_B[name]
            elif kind != "ia3":
                kind = type(layer.lora_variant[name]).__name__ if kind == "lora" else kind
                raise ValueError(
                    f"adapter: what {name!r} costs is not known, an adapter of the kind {kind!r}; count without it, by "
                    "a plan with adapter=()"
                )


def linear_flops(module: Any, positions: int) -> int:
    """A linear layer at ``positions`` positions, with the LoRA that acts."""
    layer = base_layer(module)
    total: int = 2 * positions * layer.in_features * layer.out_features
    for down, up in _adapters(module):
        total += 2 * positions * (down.in_features * down.out_features + up.in_features * up.out_features)
    return total


def conv_flops(module: Any, size: Size) -> int:
    """A convolution that writes an image of ``size``, with the LoRA that acts."""
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
