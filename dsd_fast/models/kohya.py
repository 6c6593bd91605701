"""The names that LoRA files of kohya's scripts (sd-scripts, LyCORIS, OneTrainer) give a model's layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from dsd_fast.models.tuners import tuner_layers

# By the number of the text encoder.
_TEXT = (("lora_te_", "lora_te1_"), ("lora_te2_",))

# Names of the original code that differ from diffusers' inside a residual block and outside of all blocks.
_RESNET = {
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}


def unet_names(unet: Any) -> Iterator[tuple[str, str]]:
    """Every layer's names and path: diffusers' own name, and the original code's as SDXL's files have it."""
    blocks = dict(_original_blocks(unet))
    for path in layer_paths(unet):
        yield "lora_unet_" + path.replace(".", "_"), path
        if path in _OUTSIDE:
            yield "lora_unet_" + _OUTSIDE[path], path
        block = next((block for block in blocks if path == block or path.startswith(f"{block}.")), None)
        if block is not None:
            inner = path[len(block) :].lstrip(".")
            inner = (_RESNET[inner] if ".resnets." in block else inner.replace(".", "_")) if inner else ""
            yield f"lora_unet_{blocks[block]}_{inner}".rstrip("_"), path


def text_names(encoder: Any, number: int) -> Iterator[tuple[str, str]]:
    """Every layer's names and path of the first (0) or second (1) text encoder."""
    for path in layer_paths(encoder):
        for prefix in _TEXT[number]:
            # CLIP's text tower is inside `text_model` in every file, but not in every transformers class.
            inner = path if path == "text_projection" else f"text_model.{path.removeprefix('text_model.')}"
            yield prefix + inner.replace(".", "_"), path


def layer_paths(network: Any) -> Iterator[str]:
    """Paths of the linear layers and convolutions; of one with an adapter that of the adapted whole."""
    layers = dict(tuner_layers(network))
    for path, module in network.named_modules():
        bare = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        inside = any(path[:end] in layers for end, sign in enumerate(path) if sign == ".")
        if isinstance(bare, nn.Linear | nn.Conv2d) and not inside:
            yield path


def _original_blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """Paths of diffusers' blocks with their names in the original code (CompVis/latent-diffusion)."""
    for name, number in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        yield f"mid_block.{name}", f"middle_block_{number}"
    # Among the original's input blocks the first convolution and the downsamplers have a number of their own.
    for part, side, number, blocks in (("down", "input", 1, unet.down_blocks), ("up", "output", 0, unet.up_blocks)):
        for level, block in enumerate(blocks):
            path = f"{part}_blocks.{level}"
            for layer in range(len(block.resnets)):
                yield f"{path}.resnets.{layer}", f"{side}_blocks_{number}_0"
                yield f"{path}.attentions.{layer}", f"{side}_blocks_{number}_1"
                number += 1
            if part == "up":
                place = 2 if hasattr(block, "attentions") else 1
                yield f"{path}.upsamplers.0.conv", f"{side}_blocks_{number - 1}_{place}_conv"
            elif block.downsamplers:
                yield f"{path}.downsamplers.0.conv", f"{side}_blocks_{number}_0_op"
                number += 1
