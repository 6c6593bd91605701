"""LoRA checkpoints of the official DSD code (eric-ai-lab/DSD, `save_attn_procs` of its patched diffusers)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsd_fast.models import ModelError
from dsd_fast.models.lora import put_unet_lora

ADAPTER = "dsd"
# In the order in which the official loader tries them.
FILES = ("pytorch_lora_weights.safetensors", "pytorch_model.bin")

_ATTENTION = r"(?:down_blocks\.\d+|up_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+\.attn[12]"
_KEY = re.compile(rf"(?:unet\.)?({_ATTENTION})\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_MODULES = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
_SIDES = {"down": "lora_A", "up": "lora_B"}


def load_attn_procs(
    unet: Any,
    pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    weight_name: str | None = None,
) -> None:
    """Loads an official LoRA checkpoint into a UNet as its active adapter, "dsd", at scale 1.

    The file is a flat mapping, for each self- and cross-attention and each of to_q, to_k, to_v and to_out, from
    "<attention>.processor.<projection>_lora.down.weight" to a (rank, in) tensor and from "….up.weight" to an (out,
    rank) one: 256 float32 tensors of rank 4 for SD 1.x and 2.x, without alphas. A checkpoint loaded before is replaced.

    The official files are pickles. They are read with torch's `weights_only=True`, which makes tensors and containers
    and runs no code; nowhere else in this package is a pickle read.

    Args:
        unet: a diffusers UNet2DConditionModel.
        pretrained_model_name_or_path_or_dict: a folder with "pytorch_lora_weights.safetensors" or "pytorch_model.bin",
            a file, or the mapping itself.
        weight_name: the file inside the folder.

    Raises:
        ModelError: no such file, one that holds something else, or tensors that are not those of the UNet's attention
            layers.
    """
    source = pretrained_model_name_or_path_or_dict
    weights: Mapping[str, Tensor]
    if isinstance(source, Mapping):
        weights, what = source, "LoRA"
    else:
        file = _find(Path(source), weight_name)
        weights, what = _read(file), f"LoRA {str(file)!r}"
    put_unet_lora(unet, _translate(weights, unet, what), ADAPTER, what)


def _find(source: Path, weight_name: str | None) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise ModelError(f"LoRA {str(source)!r} does not exist, expected a folder or a file")
    names = FILES if weight_name is None else (weight_name,)
    for name in names:
        if (source / name).is_file():
            return source / name
    raise ModelError(f"LoRA folder {str(source)!r} has no file {' or '.join(repr(name) for name in names)}")


def _read(file: Path) -> Mapping[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Its advice to read the file without weights_only=True is not for passing on.
        text = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ModelError(f"LoRA {str(file)!r} cannot be read as tensors alone (weights_only=True): {text}") from error
    if not isinstance(weights, Mapping):
        raise ModelError(f"LoRA {str(file)!r} holds a {type(weights).__name__}, expected a mapping of names to tensors")
    return weights


def _translate(weights: Mapping[str, Tensor], unet: Any, what: str) -> dict[str, Tensor]:
    """The weights under diffusers' present names, checked against the UNet."""
    wanted = {
        f"{path}.{module}": unet.get_submodule(f"{path}.{module}")
        for path in _attentions(unet)
        for module in _MODULES.values()
    }
    result: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None or not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim != 2:
            raise ModelError(
                f"{what} holds {key!r}, expected matrices named '<attention>.processor.to_q_lora.down.weight' and so on"
            )
        path, projection, side = match.groups()
        name = f"{path}.{_MODULES[projection]}"
        if name not in wanted:
            raise ModelError(f"{what} holds {key!r}, but the UNet has no attention layer {path!r}")
        layer = wanted[name]
        given = tensor.shape[1] if side == "down" else tensor.shape[0]
        expected = layer.in_features if side == "down" else layer.out_features
        if given != expected:
            raise ModelError(f"{what}: {key!r} has width {given}, expected the UNet's {expected}")
        result[f"{name}.{_SIDES[side]}.weight"] = tensor
    for name in wanted:
        pair = [result.get(f"{name}.{side}.weight") for side in _SIDES.values()]
        if pair[0] is None or pair[1] is None:
            raise ModelError(f"{what} has {len(result)} tensors, expected {2 * len(wanted)}; {name!r} lacks its own")
        if pair[0].shape[0] != pair[1].shape[1]:
            raise ModelError(
                f"{what}: {name!r} has ranks {pair[0].shape[0]} and {pair[1].shape[1]}, expected equal ones"
            )
    return result


def _attentions(unet: Any) -> list[str]:
    return [name for name, _ in unet.named_modules() if re.fullmatch(_ATTENTION, name)]
