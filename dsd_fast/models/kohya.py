"""LoRA files of kohya's scripts (sd-scripts, LyCORIS' LoCon), read by the names of a model's own layers.

diffusers reads them too, but drops the alphas of attention layers that differ from the most frequent one, as the
layers do where LoCon has an alpha of its own for convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dsd_fast.models.errors import ModelError
from dsd_fast.models.tuners import tuner_layers

_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_UNET = "lora_unet_"
# By the number of text encoders.
_TEXT = {1: ("lora_te_",), 2: ("lora_te1_", "lora_te2_")}

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


@dataclass(frozen=True)
class KohyaLora:
    """One network's part of a file.

    Attributes:
        weights: "<module>.lora_A.weight" (rank, in, …) and "<module>.lora_B.weight" (out, rank, …).
        ranks: (rank, alpha) by module; the factor on its product is alpha / rank.
    """

    weights: dict[str, Tensor]
    ranks: dict[str, tuple[int, float]]


def is_kohya(keys: Sequence[str]) -> bool:
    """Whether a file's keys are of kohya's scripts or of LyCORIS."""
    return any(key.startswith((_UNET, *_TEXT[1], *_TEXT[2])) for key in keys)


def from_kohya(
    tensors: Mapping[str, Tensor], unet: Any, text_encoders: Sequence[Any], what: str
) -> tuple[KohyaLora, tuple[KohyaLora, ...]]:
    """The parts of the UNet and of each text encoder.

    Args:
        tensors: "<layer>.lora_down.weight" (rank, in) or (rank, in, k, k), "<layer>.lora_up.weight" (out, rank) or
            (out, rank, 1, 1), and perhaps "<layer>.alpha", without which it is the rank.
        unet, text_encoders: of the model; SDXL's layers are found under the original code's names as well.
        what: the file's name in errors.

    Raises:
        ModelError: a layer that the model does not have, one half of a product without the other, or weights of another
            kind than plain LoRA: LoHa, LoKr, DoRA, LoCon in its Tucker form, whole weights.
    """
    layers = {_UNET + name: (0, path) for name, path in _unet_names(unet)}
    for number, (prefix, encoder) in enumerate(zip(_TEXT[len(text_encoders)], text_encoders, strict=True), 1):
        layers |= {prefix + name: (number, path) for name, path in _text_names(encoder)}
    parts = [KohyaLora({}, {}) for _ in range(1 + len(text_encoders))]
    for key in tensors:
        name, _, kind = key.partition(".")
        if name not in layers:
            raise ModelError(f"{what} has weights for {name!r}, a layer that the model does not have")
        if f".{kind}" not in (_DOWN, _UP, _ALPHA):
            raise ModelError(
                f"{what} has {key!r}, which is of another kind than plain LoRA, such as LoHa, LoKr or DoRA"
            )
        for here, missing in ((_DOWN, name + _UP), (_UP, name + _DOWN)):
            if f".{kind}" == here and missing not in tensors:
                raise ModelError(f"{what} has {key!r} but no {missing!r}")
        if f".{kind}" != _DOWN:
            continue
        number, path = layers[name]
        down, up = tensors[key], tensors[name + _UP]
        alpha = tensors.get(name + _ALPHA)
        parts[number].ranks[path] = (len(down), float(len(down) if alpha is None else alpha))
        parts[number].weights[f"{path}.lora_A.weight"] = down
        parts[number].weights[f"{path}.lora_B.weight"] = up
    return parts[0], tuple(parts[1:])


def _unet_names(unet: Any) -> Iterator[tuple[str, str]]:
    """Every layer's names and path: diffusers' own name, and the original code's as SDXL's files have it."""
    blocks = dict(_original_blocks(unet))
    for path in _layer_paths(unet):
        yield path.replace(".", "_"), path
        if path in _OUTSIDE:
            yield _OUTSIDE[path], path
        block = next((block for block in blocks if path == block or path.startswith(f"{block}.")), None)
        if block is not None:
            inner = path[len(block) :].lstrip(".")
            inner = (_RESNET[inner] if ".resnets." in block else inner.replace(".", "_")) if inner else ""
            yield f"{blocks[block]}_{inner}".rstrip("_"), path


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


def _text_names(encoder: Any) -> Iterator[tuple[str, str]]:
    """CLIP's text tower is inside `text_model` in every file, but not in every transformers class."""
    for path in _layer_paths(encoder):
        yield "text_model_" + path.removeprefix("text_model.").replace(".", "_"), path


def _layer_paths(network: Any) -> Iterator[str]:
    """Paths of the linear layers and convolutions; of one with an adapter that of the adapted whole."""
    layers = dict(tuner_layers(network))
    for path, module in network.named_modules():
        bare = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        inside = any(path[:end] in layers for end, sign in enumerate(path) if sign == ".")
        if isinstance(bare, nn.Linear | nn.Conv2d) and not inside:
            yield path
