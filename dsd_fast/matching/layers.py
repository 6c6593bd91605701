"""Which cross-attention layers a score reads, and with what weight."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsd_fast.kernels.common.host import as_tensor
from dsd_fast.matching.config import Layers
from dsd_fast.unet import UNetProgram

log = logging.getLogger("dsd_fast")

PARTS = ("down", "mid", "up")


def official_layers(program: UNetProgram) -> list[str]:
    """The layers of the official code: of each of the down, middle and up part the last block with cross-attention,
    all its transformers, of each the last transformer block. Six on SD 1.x and 2.x; a part that has none gives none
    (:func:`parts_without`)."""
    chosen: list[str] = []
    for part in PARTS:
        ids = [name for name in program.score_ids if name.startswith(f"{part}-")]
        last_level = ids[-1].split("-")[1] if ids else None
        last_of_vit: dict[str, str] = {}
        for name in ids:
            if part == "mid" or name.split("-")[1] == last_level:
                last_of_vit[name.rpartition("-block")[0]] = name
        chosen += last_of_vit.values()
    return chosen


def parts_without(program: UNetProgram) -> list[str]:
    """The parts, of "down", "mid" and "up", that have no cross-attention."""
    return [part for part in PARTS if not any(name.startswith(f"{part}-") for name in program.score_ids)]


def layer_weights(program: UNetProgram, layers: Layers) -> dict[str, Tensor]:
    """Score id → (H,) float32 weights of its heads; a layer's weight is spread evenly over its heads.

    Raises:
        ValueError: an unknown score id, or a number of weights that is not the layer's number of heads.
    """
    heads = {name: int(program.attention(name).heads) for name in program.score_ids}
    if isinstance(layers, Mapping):
        given = dict(layers)
    else:
        ids: Sequence[str] = layers
        if isinstance(layers, str):
            ids = program.score_ids if layers == "all" else official_layers(program)
            missing = parts_without(program)
            if missing and layers == "official":
                where = " and ".join(missing)
                log.warning("layers: 'official' takes none of the part %s: no cross-attention there", where)
            if not ids:
                raise ValueError(f"layers: got {layers!r}, but this network has no cross-attention")
        given = dict.fromkeys(ids, 1.0 / len(ids))
    weights = {}
    for name, value in given.items():
        # An unknown id is left to the plan, which names the nearest legal ones.
        count = heads.get(name, 1)
        if isinstance(value, (int, float)):
            weights[name] = torch.full((count,), value / count, dtype=torch.float32, device="cpu")
            continue
        weights[name] = as_tensor(value).float()
        if weights[name].shape != (count,):
            raise ValueError(f"layers: {name!r} has {count} heads, got {tuple(weights[name].shape)} weights")
    return weights
