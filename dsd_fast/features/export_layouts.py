"""How features lie in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.nn import functional

from dsd_fast.jobs import Row, ShardFiles, Write, stream_tensors

LAYOUTS = ("shards", "npy-layer", "npy-sample", "npy-aggregated")


def writer_of(layout: str, timesteps: int, about: Mapping[str, Any]) -> Write:
    """What writes the rows of a shard, whose payloads are id → (S, C, h, w) or (S, D, C, h, w) on the CPU.

    Args:
        layout: "shards": shards/<shard>.safetensors, a tensor per layer with the rows along its first axis;
            "npy-layer": <layer>/<name>.npy; "npy-sample": <name>/<layer>.npy; "npy-aggregated": <name>.npy, all layers
            enlarged (nearest) to the largest and side by side along the channels. These three are the official
            extract_feature.py's; of one timestep their arrays have no axis for it, as there.
        timesteps: S.
        about: JSON kept in the header of safetensors files.
    """

    def shards(files: ShardFiles, rows: Sequence[Row]) -> None:
        with files.open(suffix=".safetensors") as stream:
            stream_tensors(stream, {layer: [row.payload[layer] for row in rows] for layer in rows[0].payload}, about)

    def arrays(files: ShardFiles, rows: Sequence[Row]) -> None:
        for row in rows:
            found = {"": aggregated(row.payload)} if layout == "npy-aggregated" else row.payload
            for layer, value in found.items():
                parts = {"npy-layer": [layer, row.name], "npy-sample": [row.name, layer]}.get(layout, [row.name])
                with files.open(f"{'/'.join(parts)}.npy") as stream:
                    write_array(stream, value[0] if timesteps == 1 else value)

    return shards if layout == "shards" else arrays


def aggregated(features: Mapping[str, Tensor]) -> Tensor:
    """All maps enlarged (nearest) to the largest height and width, side by side: (…, sum of C, H, W).

    Args:
        features: id → (…, C, h, w).
    """
    size = tuple(max(value.shape[axis] for value in features.values()) for axis in (-2, -1))
    maps = []
    for value in features.values():
        large = value
        if value.shape[-2:] != size:
            flat = value.reshape(-1, *value.shape[-3:])
            large = functional.interpolate(flat, size, mode="nearest").view(*value.shape[:-2], *size)
        maps.append(large)
    return torch.cat(maps, dim=-3)


def write_array(stream: BinaryIO, value: Tensor) -> None:
    """Writes a ``.npy`` file; bfloat16, which NumPy has not, as float32.

    Raises:
        OSError: the disk is full.
    """
    from numpy.lib import format as npy

    array = (value.float() if value.dtype == torch.bfloat16 else value).contiguous().numpy()
    npy.write_array_header_1_0(stream, npy.header_data_from_array_1_0(array))
    # Not `write_array`, which tells a full disk by the number of elements that it had room for.
    stream.write(array.data)
