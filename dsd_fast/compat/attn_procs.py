"""LoRA checkpoints of the official DSD code as files; see :mod:`dsd_fast.models.attn_procs` for what they hold."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsd_fast.models import ModelError
from dsd_fast.models.attn_procs import check_official
from dsd_fast.models.lora import put_unet_lora, save_official_lora

ADAPTER = "dsd"
# In the order in which the official loader tries them.
FILES = ("pytorch_lora_weights.safetensors", "pytorch_model.bin")


def load_attn_procs(
    unet: Any,
    pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    weight_name: str | None = None,
) -> None:
    """Loads an official LoRA checkpoint into a UNet as its active adapter, "dsd", at scale 1.

    A checkpoint loaded before is replaced.

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
    check_official(weights, unet, what)
    put_unet_lora(unet, weights, ADAPTER, what)


def save_attn_procs(
    unet: Any, save_directory: str | os.PathLike[str], *, name: str = ADAPTER, weight_name: str | None = None
) -> None:
    """Writes an adapter of a UNet as an official LoRA checkpoint, which the official code and `load_attn_procs` read.

    For SD 1.x and 2.x these are 256 float32 matrices. The file knows no alpha, so the adapter's scale, alpha / rank, is
    in the up matrices; a strength that was set on the network (`set_adapters`) is not. Layers without weights of their
    own, as of a LoRA on cross-attention alone, get zeros, which add nothing. The official code reads one rank for the
    four projections of an attention, so smaller ones are filled up with zeros.

    Args:
        unet: a diffusers UNet2DConditionModel.
        save_directory: the folder, made where there is none.
        name: of the adapter.
        weight_name: the file's name, ".safetensors"; None: "pytorch_lora_weights.safetensors", which the official
            loader looks for first. The file appears whole or not at all.

    Raises:
        ModelError: no such adapter; one with layers other than the attentions' projections, or of another kind than
            plain LoRA; a rank beyond a layer's width; values that are not finite; another ending of the file's name.
        OSError: the folder cannot be written, or the disk is full.
    """
    save_official_lora(unet, name, Path(save_directory) / (weight_name or FILES[0]))


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
        text = str(error).rpartition("WeightsUnpickler error: ")[2]
        text = " ".join(re.split(r"Please use|Check the documentation", text)[0].split())
        raise ModelError(f"LoRA {str(file)!r} cannot be read as tensors alone (weights_only=True): {text}") from error
    if not isinstance(weights, Mapping):
        raise ModelError(f"LoRA {str(file)!r} holds a {type(weights).__name__}, expected a mapping of names to tensors")
    return weights
