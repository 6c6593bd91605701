"""The LoRA checkpoint of the official DSD code (eric-ai-lab/DSD, `save_attn_procs` of its patched diffusers).

A flat mapping, for each self- and cross-attention and each of to_q, to_k, to_v and to_out, from
"<attention>.processor.<projection>_lora.down.weight" to a (rank, in) matrix and from "….up.weight" to an (out, rank)
one: 256 float32 matrices of rank 4 for SD 1.x and 2.x, at scale 1, without alphas.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsd_fast.models.errors import ModelError
from dsd_fast.models.lora_formats import read_lora

_ATTENTION = r"(?:down_blocks\.\d+|up_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+\.attn[12]"
_MODULES = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}


def check_official(weights: Mapping[Any, Any], unet: Any, what: str) -> None:
    """Refuses a mapping that is not an official checkpoint of the UNet, with every matrix and no other.

    Args:
        weights: the mapping; a name may have "unet." before it.
        unet: the UNet that it shall fit.
        what: its name in errors.

    Raises:
        ModelError: names the key that is missing, unknown or given twice, or whose matrix does not fit.
    """
    wanted = {
        _official_key(path, projection, side)
        for path in _attentions(unet)
        for projection in _MODULES
        for side in ("down", "up")
    }
    names = {key: key.removeprefix("unet.") if isinstance(key, str) else key for key in weights}
    other = next((key for key, name in names.items() if name not in wanted), None)
    if other is not None:
        raise ModelError(
            f"{what} holds {other!r}, expected matrices named '<attention>.processor.to_q_lora.down.weight' and so on, "
            f"for attention layers that the UNet has"
        )
    missing = min(wanted.difference(names.values()), default=None)
    if missing is not None:
        raise ModelError(f"{what} has {len(weights)} matrices, expected {len(wanted)}; {missing!r} is missing")
    read_lora(weights, unet, (), what)


def to_official(unet: Any, name: str, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """An adapter of a UNet as an official checkpoint, on the CPU; exact up to float32's rounding.

    The file knows no alpha, so the adapter's scale, alpha / rank, is in the up matrices. It has matrices for every
    attention layer, so layers that the adapter leaves alone get zeros. The official code reads one rank for the four
    projections of an attention, so the smaller ones are filled up with zeros.

    Args:
        unet: a diffusers UNet2DConditionModel.
        name: of the adapter.
        layers: PEFT's layers of it, by the paths of the modules that they adapt.

    Raises:
        ModelError: layers other than the attentions' projections; a rank beyond a layer's width; values that are not
            finite.
    """
    attentions = {path: {p: f"{path}.{module}" for p, module in _MODULES.items()} for path in _attentions(unet)}
    places = {place for paths in attentions.values() for place in paths.values()}
    other = next((path for path in layers if path not in places), None)
    if other is not None:
        raise ModelError(
            f"adapter {name!r} has weights for {other!r}, expected to_q, to_k, to_v and to_out.0 of attention layers "
            f"alone: an official checkpoint has no others"
        )
    highest = max(layer.r[name] for layer in layers.values())
    result = {}
    for path, projections in attentions.items():
        rank = max((layers[p].r[name] for p in projections.values() if p in layers), default=highest)
        for projection, place in projections.items():
            down, up = _matrices(unet.get_submodule(place), name, unet.peft_config[name].use_rslora)
            if rank > min(down.shape[1], up.shape[0]):
                raise ModelError(
                    f"adapter {name!r}: {place!r} of width {min(down.shape[1], up.shape[0])} would get rank {rank}, "
                    f"which the official code refuses"
                )
            missing = rank - len(down)
            result[_official_key(path, projection, "down")] = F.pad(down, (0, 0, 0, missing))
            result[_official_key(path, projection, "up")] = F.pad(up, (0, missing))
    check_official(result, unet, f"adapter {name!r}")
    return result


def _matrices(layer: Any, name: str, by_root: bool) -> tuple[Tensor, Tensor]:
    """An adapter's (rank, in) and (out, rank) for a linear layer, their product what it adds; of rank 0 if nothing."""
    if name not in getattr(layer, "lora_A", ()):
        return torch.zeros(0, layer.in_features, dtype=torch.float32, device="cpu"), torch.zeros(
            layer.out_features, 0, dtype=torch.float32, device="cpu"
        )
    down, up = (side[name].weight.detach().cpu().float() for side in (layer.lora_A, layer.lora_B))
    # rsLoRA (Kalajdzievski, arXiv 2312.03732) divides by the root.
    return down, up * (layer.lora_alpha[name] / layer.r[name] ** (0.5 if by_root else 1))


def _official_key(path: str, projection: str, side: str) -> str:
    return f"{path}.processor.{projection}_lora.{side}.weight"


def _attentions(unet: Any) -> list[str]:
    return [name for name, _ in unet.named_modules() if re.fullmatch(_ATTENTION, name)]
