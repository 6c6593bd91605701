"""A tuned converter in a folder.

prompt.json                           the settings, what was learned, and of which model; written last
pytorch_lora_weights.safetensors      the LoRA, as stock diffusers' ``pipe.load_lora_weights(folder)`` reads it
cross_attention.safetensors           "<module>.weight" of the UNet: matrices that were learned whole
deep_prompts.safetensors              under the names of SD-IPC's code
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsd_fast.engine.fingerprint import adapters_identity, check_same_adapters, check_same_model, model_identity
from dsd_fast.engine.lora import own_model, put_lora
from dsd_fast.image_prompt.config import ImagePromptConfig
from dsd_fast.image_prompt.converter import Conversion
from dsd_fast.image_prompt.deep_prompts import DeepPrompts, PromptedVision
from dsd_fast.image_prompt.tuned import Made, full_matrices, is_full
from dsd_fast.jobs import read_tensors, remove_stale, replacing, weights_hash, write_tensors
from dsd_fast.kernels.common.host import ordinary
from dsd_fast.models.lora import save_lora
from dsd_fast.training import as_json

if TYPE_CHECKING:
    from dsd_fast.models import Model

ABOUT = "prompt.json"
LORA = "pytorch_lora_weights.safetensors"
FULL = "cross_attention.safetensors"
PROMPTS = "deep_prompts.safetensors"
FILES = (ABOUT, LORA, FULL, PROMPTS)

_KEYS = ("model", "adapter", "strengths", "config", "lora", "full", "deep_prompts", "vision")


def write(folder: Path, converter: Conversion) -> None:
    """See :meth:`dsd_fast.image_prompt.ImagePromptConverter.save`; the caller has the folder's lock."""
    model, vision = converter.model, converter.vision
    prompted = isinstance(vision, PromptedVision)
    plain = vision.plain if isinstance(vision, PromptedVision) else vision
    # Until the last file is in place nothing vouches for the others.
    (folder / ABOUT).unlink(missing_ok=True)
    for name in FILES:
        remove_stale(folder / name)
    for name, there in ((LORA, converter.lora), (FULL, converter.full), (PROMPTS, prompted)):
        if not there:
            (folder / name).unlink(missing_ok=True)
    if converter.lora is not None:
        save_lora(model.unet, converter.lora, folder / LORA)
    if converter.full:
        write_tensors(folder / FULL, full_matrices(model.unet))
    about = {
        "format": 1,
        "model": model_identity(model),
        "adapter": converter.adapter,
        **adapters_identity(converter.engine, converter.lora),
        "config": asdict(converter.config),
        "lora": converter.lora is not None,
        "full": converter.full,
        "deep_prompts": None,
        # Of the encoder that the deep prompts are for.
        "vision": {"dtype": str(model.clip.dtype), "weights": weights_hash([plain])},
    }
    if isinstance(vision, PromptedVision):
        write_tensors(folder / PROMPTS, vision.prompts.state_dict())
        about["deep_prompts"] = {"replace_first": vision.prompts.replace_first}
    with replacing(folder / ABOUT) as file:
        file.write(json.dumps(as_json(about), indent=2, allow_nan=False).encode() + b"\n")


@ordinary()
def read(kind: type[Made], folder: Path, model: Model, clip: Any) -> Made:
    """See :meth:`dsd_fast.image_prompt.ImagePromptConverter.load`."""
    about = read_about(folder)
    check_same_model(folder, about["model"], model)
    adapter = about["adapter"]
    base = kind(model, clip, _config(about["config"]), adapter=tuple(adapter) if isinstance(adapter, list) else adapter)
    check_same_adapters(folder, about, base.engine)
    own, lora = own_model(base.engine, lambda name: about["full"] and is_full(name)), None
    if about["lora"]:
        file = folder / LORA
        own, lora = put_lora(base.engine.with_unet(own), _tensors(file, "unet."), f"LoRA {str(file)!r}")
    if about["full"]:
        _put_full(own.unet, _tensors(folder / FULL), folder / FULL)
    vision = base.vision
    if about["deep_prompts"] is not None:
        now = {"dtype": str(base.model.clip.dtype), "weights": weights_hash([vision])}
        if now["dtype"] == about["vision"]["dtype"] and now != about["vision"]:
            raise ValueError(f"folder: {folder / PROMPTS} belongs to another CLIP's image encoder than the model's")
        tensors, what = _tensors(folder / PROMPTS), f"folder: {folder / PROMPTS}"
        first = bool(about["deep_prompts"]["replace_first"])
        vision = PromptedVision(vision, DeepPrompts.of(tensors, vision, what, replace_first=first))
    return base.tuned(own, vision, lora, about["full"])


def read_about(folder: Path) -> dict[str, Any]:
    """What :func:`write` has written about a converter, for which no model is needed.

    Raises:
        ValueError: there is no such file, or one of another format.
    """
    try:
        about = json.loads((folder / ABOUT).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"folder: {folder} has no {ABOUT}, which ImagePromptConverter.save writes") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"folder: {folder / ABOUT} is no JSON: {error}") from error
    if not isinstance(about, dict) or about.get("format") != 1 or any(key not in about for key in _KEYS):
        raise ValueError(f"folder: {folder / ABOUT} is of another format, expected 1")
    return about


@torch.no_grad()
def _put_full(unet: Any, tensors: Mapping[str, Tensor], file: Path) -> None:
    own = full_matrices(unet)
    wrong = {name for name in own.keys() | tensors.keys() if name not in own or name not in tensors}
    wrong |= {name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape}
    if wrong:
        raise ValueError(f"folder: {file} does not fit the UNet at {sorted(wrong)[0]}")
    for name, value in own.items():
        value.copy_(tensors[name])


def _tensors(file: Path, prefix: str = "") -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        return read_tensors(file, prefix)[0]
    except FileNotFoundError:
        raise ValueError(f"folder: {file} is missing, expected the file that ImagePromptConverter.save wrote") from None
    except SafetensorError as error:
        raise ValueError(f"folder: {file} is no safetensors file: {error}") from error


def _config(values: Mapping[str, Any]) -> ImagePromptConfig:
    unknown = sorted(values.keys() - {each.name for each in fields(ImagePromptConfig)})
    if unknown:
        raise ValueError(f"folder: {ABOUT} has unknown settings: {', '.join(unknown)}")
    return ImagePromptConfig(**values)
