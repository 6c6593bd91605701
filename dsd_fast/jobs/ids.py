"""Names of rows that follow from their content."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd_fast.jobs.tensors import tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_BYTES = 16
_ID = re.compile(f"[0-9a-fA-F]{{{2 * _BYTES}}}")
# Of a network's config: how its file was made. The weights' hash knows the types.
_OF_THE_FILE = {"architectures", "dtype", "torch_dtype", "transformers_version"}


def row_id(*parts: bytes | str) -> str:
    """What a row is known by: BLAKE2b of all that makes it, each part behind its length, 32 hexadecimal digits.

    A str counts as its UTF-8 bytes; what of a file's name is no text, as the bytes that the system gave.
    """
    digest = hashlib.blake2b(digest_size=_BYTES)
    for part in parts:
        content = _encoded(part) if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # Half of a surrogate pair that stands for no byte of a name.
        return text.encode("utf-8", "surrogatepass")


def worker_of(row: str, workers: int) -> int:
    """Which of ``workers`` makes the row of this id: the same wherever the row stands, and about as many for each.

    Raises:
        ValueError: ``row`` is no id that :func:`row_id` makes.
    """
    return int.from_bytes(packed(row)[:8], "big") % workers


def packed(row: str) -> bytes:
    """An id as its 16 bytes, which take less memory.

    Raises:
        ValueError: ``row`` is no id that :func:`row_id` makes.
    """
    if not _ID.fullmatch(row):
        raise ValueError(f"row is {row!r}, expected {2 * _BYTES} hexadecimal digits, as row_id makes them")
    return bytes.fromhex(row)


def file_digest(path: str | os.PathLike[str]) -> str:
    """BLAKE2b of a file's content, 32 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_BYTES)).hexdigest()


def all_tensors(module: Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers of a module, by name."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def weights_hash(
    modules: Mapping[str, Module] | Iterable[Module],
    tensors_of: Callable[[Module], Iterable[tuple[str, Tensor]]] = all_tensors,
) -> str:
    """BLAKE2b over the names, shapes, types and values of parameters and buffers, 32 hexadecimal digits.

    Adapters that hang in the modules are among their parameters; with what strength they act is not. Neither the
    device nor the layout in memory (channels-last) counts.

    Args:
        modules: name → module, or modules in an order that is part of the hash.
        tensors_of: gives those of a module that count, by name.
    """
    named = modules.items() if isinstance(modules, Mapping) else enumerate(modules)
    return tensors_hash({f"{prefix}.{name}": tensor for prefix, module in named for name, tensor in tensors_of(module)})


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b over the names, shapes, types and values of tensors, 32 hexadecimal digits; the device does not count."""
    names = sorted(tensors)
    # Hashing lets go of the interpreter, so threads share the work; each holds one tensor's copy at most.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(_tensor_digest, (tensors[name] for name in names))
        return row_id(*(part for named in zip(names, digests, strict=True) for part in named))


def _tensor_digest(tensor: Tensor) -> bytes:
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), digest_size=_BYTES)
    digest.update(tensor_bytes(tensor))
    return digest.digest()


def config_hash(network: Any) -> str:
    """BLAKE2b over the config of a network of diffusers or transformers, 32 hexadecimal digits.

    How its file was made does not count.
    """
    config = network.config
    return row_id(
        json.dumps(_told(config.to_dict() if hasattr(config, "to_dict") else config), sort_keys=True, default=str)
    )


def _told(values: Any) -> Any:
    """What of a config counts: what is off or not set may as well be missing, as where a library knows less."""
    if not isinstance(values, Mapping):
        return values
    return {
        key: _told(value)
        for key, value in values.items()
        if not str(key).startswith("_") and key not in _OF_THE_FILE and value is not None and value is not False
    }
