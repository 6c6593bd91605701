"""Tensors in safetensors files that appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd_fast.jobs.files import replacing

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Writes ``file``, and its folder where there is none.

    Args:
        tensors: name → tensor, on any device.
        about: JSON kept in the file's header.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    from safetensors.torch import save

    file.parent.mkdir(parents=True, exist_ok=True)
    # An own copy of each: safetensors refuses tensors that share memory.
    values = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with replacing(file) as stream:
        stream.write(save(values, {"about": json.dumps(about)}))


def read_tensors(file: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors whose names start with ``prefix``, without it, and what :func:`write_tensors` was told about them."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stream:
        names = [name for name in stream.keys() if name.startswith(prefix)]  # noqa: SIM118
        tensors = {name.removeprefix(prefix): stream.get_tensor(name) for name in names}
        return tensors, json.loads((stream.metadata() or {}).get("about", "null")) or {}
