"""Tensors in safetensors files that appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dsd_fast.jobs.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 8


def write_tensors(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Writes ``file``, and its folder where there is none.

    Args:
        tensors: name → tensor, on any device.
        about: JSON kept in the file's header.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        stream_tensors(stream, tensors, about)


def stream_tensors(
    stream: BinaryIO, tensors: Mapping[str, Tensor | Sequence[Tensor]], about: Mapping[str, Any] | None = None
) -> None:
    """Writes tensors in the safetensors format, one after the other, without a copy of those that lie in host memory.

    Equal tensors give equal bytes. The format is that of https://huggingface.co/docs/safetensors, whose own writer
    makes the whole file in memory first.

    Args:
        tensors: name → tensor, on any device, or tensors of one shape and dtype, which are stacked along a new first
            axis.
        about: JSON kept in the file's header.

    Raises:
        ValueError: tensors to be stacked that differ in shape or dtype, or are none; a dtype that the format has not.
        OSError: the disk is full.
    """
    stacked = {name: _stacked(name, value) for name, value in tensors.items()}
    # The largest elements first, as the format's own writer has them, so that all are aligned.
    order = sorted(stacked, key=lambda name: (-stacked[name][1][0].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"about": json.dumps(about)}}
    end = 0
    for name in order:
        shape, parts = stacked[name]
        start, end = end, end + sum(part.numel() * part.element_size() for part in parts)
        header[name] = {"dtype": _code(name, parts[0]), "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    stream.write(len(content).to_bytes(8, "little") + content)
    for name in order:
        for part in stacked[name][1]:
            stream.write(tensor_bytes(part))


def read_tensors(file: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors whose names start with ``prefix``, without it, and what :func:`write_tensors` was told about them."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stream:
        names = [name for name in stream.keys() if name.startswith(prefix)]  # noqa: SIM118
        tensors = {name.removeprefix(prefix): stream.get_tensor(name) for name in names}
        return tensors, json.loads((stream.metadata() or {}).get("about", "null")) or {}


def _stacked(name: str, value: Tensor | Sequence[Tensor]) -> tuple[list[int], Sequence[Tensor]]:
    """The shape in the file, and the parts that follow each other there."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return list(value.shape), [value]
    kinds = {(tuple(part.shape), part.dtype) for part in value}
    if len(kinds) != 1:
        found = ", ".join(f"{shape} {dtype}" for shape, dtype in sorted(kinds, key=str)) or "none"
        raise ValueError(f"tensors[{name!r}]: got {found}, expected tensors of one shape and dtype")
    return [len(value), *value[0].shape], value


def _code(name: str, tensor: Tensor) -> str:
    import torch

    codes = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
        torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    }  # fmt: skip
    if tensor.dtype not in codes:
        raise ValueError(f"tensors[{name!r}] is {tensor.dtype}, expected one of {', '.join(codes.values())}")
    return codes[tensor.dtype]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Give a tensor's elements, row by row, without a copy of what lies in host memory so."""
    import torch

    content: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return content
