"""What the attention operators share: the choice of an implementation, and in plain torch heads, biases and chunks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.common.library import traced

# Logits held at once. On a CPU 4 MiB of float32, a core's share of the last-level cache; a GPU needs far more of them
# to be busy.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
# Tensors of that size alive at a time: logits, what they become, and a mask.
CHUNK_COPIES = 4


def real_dtype(x: Tensor) -> torch.dtype:
    """The type of the arithmetic: float64 for float64, float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def choose(operator: str, q: Tensor, heads: int, earlier: str | None = None) -> str:
    """As backend.choose; Triton's implementation takes heads of 1 to 256 numbers."""
    names = backend.available(q.device.type, q.dtype)
    if not 1 <= q.shape[2] // heads <= 256:
        names = tuple(name for name in names if name != "triton")
    return backend.choose(operator, names, earlier)


def chunk_elements(device: torch.device) -> int:
    """How many logits the operators hold at once on ``device``."""
    return CHUNK_ELEMENTS["cuda" if device.type == "cuda" else "cpu"]


class _IeeeProducts:
    """Float32 products on GPUs without tf32. torch has one setting for all threads: the last to leave restores it.

    There are two ways to set it, and torch refuses to multiply where one was set and then the other.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.restore: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.restore = _ieee_products_from_now()
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.restore()


def _ieee_products_from_now() -> Callable[[], None]:
    """Switch tf32 off by the way that switched it on; what switches it on again."""
    matmul = torch.backends.cuda.matmul
    try:
        # It raises where the newer way was taken.
        on = matmul.allow_tf32
    except RuntimeError:
        before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        return lambda: setattr(matmul, "fp32_precision", before)
    if not on:
        return lambda: None
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        precision = "high"
    matmul.allow_tf32 = False

    def restore() -> None:
        matmul.allow_tf32 = True
        if precision == "medium":
            torch.set_float32_matmul_precision(precision)

    return restore


_ieee_products = _IeeeProducts()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in the type of their operands: neither autocast nor tf32 lowers them."""
    products = _ieee_products if device.type == "cuda" else nullcontext()
    with products, torch.autocast(device.type, enabled=False):
        yield


def chunks(device: torch.device, rows: int, length: int, heads: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of (rows, positions) of a bounded number of logits: whole rows where they fit, else parts of one."""
    limit = chunk_elements(device)
    per_position = max(1, heads * tokens)
    positions = max(1, min(length, limit // per_position))
    block = max(1, limit // (per_position * positions)) if positions == length else 1
    for b in range(0, rows, block):
        for start in range(0, length, positions):
            yield slice(b, min(b + block, rows)), slice(start, min(start + positions, length))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, l, H·D) → (b, H, l, D)."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(b, H, l, D) → (b, l, H·D)."""
    return x.transpose(1, 2).flatten(2)


def text_bias(
    tokens: int, text_length: Tensor | None, key_bias: Tensor | None, texts: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """(b, T): the key bias of each row's text, −inf at and beyond its length; None where there is neither."""
    bias = None if key_bias is None else key_bias[texts]
    if text_length is not None:
        beyond = torch.arange(tokens, device=texts.device) >= text_length[texts][:, None]
        bias = (torch.zeros_like(beyond, dtype=dtype) if bias is None else bias).masked_fill(beyond, float("-inf"))
    return bias


def attention_logits(q: Tensor, k: Tensor, bias: Tensor | None, heads: int, scale: float) -> Tensor:
    """(b, H, l, T) = q kᵀ·scale + bias, from q (b, l, H·D), k (b, T, H·D) without masked keys, and bias (b, T)."""
    real = real_dtype(q)
    logits = (split_heads(q, heads).to(real) * scale) @ split_heads(k, heads).to(real).transpose(-1, -2)
    if bias is None:
        return logits
    return logits + bias[:, None, None, :]


def without_masked(x: Tensor, bias: Tensor | None) -> Tensor:
    """Keys or values (b, T, H·D), zeros where ``bias`` (b, T) is −inf: what is masked may hold anything, also NaN."""
    return x if bias is None else x.masked_fill((bias == float("-inf"))[..., None], 0.0)


def probabilities(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits − lse), logits (b, H, l, T), lse (b, H, l); 0 where every key is masked (lse = −inf)."""
    return torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])


def add_by_text(total: Tensor, texts: Tensor, part: Tensor) -> None:
    """total[m] += Σ part[b] over the rows b of text m, in a fixed order (a product with a 0/1 matrix, no atomics)."""
    unique, inverse = torch.unique(texts, return_inverse=True)
    member = (torch.arange(len(unique), device=texts.device)[:, None] == inverse).to(part.dtype)
    total[unique] += (member @ part.flatten(1)).view(len(unique), *part.shape[1:])


def check_index(name: str, index: Tensor, shape: tuple[int, ...], limit: int) -> Tensor:
    """``index`` as int64.

    Raises:
        ValueError: its shape, its type, or on a CPU a value below 0 or at or above ``limit``.
    """
    if index.shape != shape or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: got {tuple(index.shape)} {index.dtype}, expected {shape} of int32 or int64")
    # Values on the GPU were checked on the host before their upload; reading them here would stall the stream.
    if index.device.type == "cpu" and index.numel() and not traced():
        low, high = (int(x) for x in torch.aminmax(index))
        if low < 0 or high >= limit:
            raise ValueError(f"{name}: values from {low} to {high}, expected 0 to {limit - 1}")
    return index.long()


def check_projections(q: Tensor, heads: int, **projections: Tensor | None) -> None:
    """Of queries (B, L, H·D) and the keys and values (M, T, H·D) of texts.

    Raises:
        ValueError: a shape, type or device that does not fit, by the argument's name.
    """
    if q.ndim != 3 or heads < 1 or q.shape[2] % heads:
        raise ValueError(f"q: got {tuple(q.shape)}, expected (B, L, H·D) with H = heads = {heads}")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q: got {q.dtype}, expected a floating-point type")
    k = projections["k"]
    for name, value in projections.items():
        if value is None:
            continue
        if value.ndim != 3 or value.shape[2] != q.shape[2] or (k is not None and value.shape != k.shape):
            raise ValueError(f"{name}: got {tuple(value.shape)}, expected (M, T, {q.shape[2]}), the same for k and v")
        if value.dtype != q.dtype or value.device != q.device:
            raise ValueError(f"{name}: got {value.dtype} on {value.device}, expected {q.dtype} on {q.device} like q")


def check_per_key(name: str, value: Tensor | None, k: Tensor, dtype: torch.dtype) -> None:
    """Of what each key of each text has one of.

    Raises:
        ValueError: ``value`` is not (M, T) of ``dtype``.
    """
    if value is not None and (value.shape != k.shape[:2] or value.dtype != dtype):
        raise ValueError(
            f"{name}: got {tuple(value.shape)} {value.dtype}, expected (M, T) = {tuple(k.shape[:2])} {dtype}"
        )


def check_texts(
    text_index: Tensor | None, text_length: Tensor | None, rows: int, k: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Both as int64.

    Raises:
        ValueError: one that does not fit q's rows and the texts k (M, T, H·D), or a missing ``text_index``.
    """
    if text_index is not None:
        text_index = check_index("text_index", text_index, (rows,), k.shape[0])
    elif k.shape[0] != rows:
        raise ValueError(f"text_index: needed when k has {k.shape[0]} texts for q's {rows} rows")
    if text_length is not None:
        text_length = check_index("text_length", text_length, (k.shape[0],), k.shape[1] + 1)
    return text_index, text_length


def rows_texts(text_index: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """``text_index``; without one, row b has text b."""
    return torch.arange(rows, device=device) if text_index is None else text_index
