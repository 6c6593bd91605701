"""What the program would silently ignore or get wrong, refused by name.

The program calls a network's leaf modules itself. Whatever lives in the forward methods it goes around (attention
processors of other methods, FreeU, offload hooks, unusual block types) would have no effect, so it is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from dsd_fast.models.private import compiled_forward
from dsd_fast.unet.flops import base_layer

# Processors that compute softmax(q kᵀ·scale) v and nothing else.
PLAIN_PROCESSORS = frozenset({"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"})

# Setting → what is supported, the default first; of a setting for each block, for each.
CONFIG: dict[str, tuple[Any, ...]] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "class_embed_type": (None,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
}


class UnsupportedNetworkError(ValueError):
    """A network, or something attached to it, that the program cannot answer for."""


def check_architecture(unet: Any) -> None:
    """Refuse a network whose configuration the program does not know.

    Raises:
        UnsupportedNetworkError: names the setting, its value and what is supported.
    """
    name = type(unet).__name__
    if name != "UNet2DConditionModel":
        raise UnsupportedNetworkError(f"unet: {name} is not supported, expected diffusers' UNet2DConditionModel")
    for key, allowed in CONFIG.items():
        values = unet.config.get(key, allowed[0])
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise UnsupportedNetworkError(f"unet.config.{key}: {value!r} is not supported, expected {expected}")
    widths = unet.config.cross_attention_dim
    if not isinstance(widths, int) and len(set(widths)) > 1:
        raise UnsupportedNetworkError(f"unet.config.cross_attention_dim: {widths} is not supported, expected one width")
    if getattr(unet, "hf_quantizer", None) is not None:
        raise UnsupportedNetworkError(
            "unet: quantised layers are not supported; load it in float32, float16 or bfloat16"
        )
    for path, module in unet.named_modules():
        _check_module(path or "unet", module)


def _check_module(path: str, module: nn.Module) -> None:
    if hasattr(module, "_hf_hook"):
        raise UnsupportedNetworkError(f"{path}: an offload hook of accelerate is attached; load the model without it")
    if hasattr(module, "_diffusers_hook"):
        raise UnsupportedNetworkError(
            f"{path}: a hook of diffusers (offloading, layerwise casting or caching) is attached; remove it"
        )
    weight = getattr(base_layer(module), "weight", None)
    if weight is None:
        return
    foreign = type(weight).__module__.partition(".")[0] != "torch"
    if foreign or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        kind = f"{type(base_layer(module)).__name__} with a {type(weight).__name__} of {weight.dtype}"
        raise UnsupportedNetworkError(f"{path}: quantised layers are not supported, found {kind}")


def check_attachments(unet: Any, attentions: Iterable[tuple[str, Any]], bypassed: Iterable[tuple[str, Any]]) -> None:
    """Refuse what was attached to a known network: cheap enough for every call.

    Args:
        attentions: the attention modules by path.
        bypassed: the modules whose forward the program does not call, by path.

    Raises:
        UnsupportedNetworkError: names the module and what is attached to it.
    """
    for path, attention in attentions:
        name = type(attention.processor).__name__
        if name not in PLAIN_PROCESSORS:
            what = "an IP-Adapter is loaded" if name.startswith("IPAdapter") else "an attention processor is set"
            raise UnsupportedNetworkError(f"{path}: {what} ({name}) that the program would ignore; remove it")
    for index, block in enumerate(unet.up_blocks):
        if any(getattr(block, key, None) for key in ("s1", "s2", "b1", "b2")):
            raise UnsupportedNetworkError(f"up_blocks.{index}: FreeU is enabled; call disable_freeu() first")
    for path, module in bypassed:
        what = ""
        if module._forward_hooks or module._forward_pre_hooks:
            what = "a forward hook is registered on"
        elif "forward" in module.__dict__ and not compiled_forward(module):
            what = "another forward was put on"
        if what:
            raise UnsupportedNetworkError(f"{path}: {what} a module whose forward the program does not call; remove it")
    if hasattr(unet, "_hf_hook") or hasattr(unet, "_diffusers_hook"):
        _check_module("unet", unet)
