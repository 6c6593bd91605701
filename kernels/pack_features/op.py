"""``dsd_fast::pack_features``: the registered operator and the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.common.attention import check_index
from dsd_fast.kernels.common.autograd import check_transforms
from dsd_fast.kernels.common.library import operator, traced
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.kernels.pack_features import reference

NAME = "pack_features"

MODES = ("bilinear", "nearest", "area", "max")


def _implementation(x: Tensor, out: Tensor) -> str:
    # Kernels read and write the types that they take; any other is the reference's, as float64 is.
    names = backend.available(x.device.type, x.dtype if out.dtype in backend.KERNEL_DTYPES else out.dtype)
    return backend.choose(NAME, tuple(name for name in names if name != "cpu"))


# Functionalisation has an argument `mode` of its own, which one of that name in a schema would meet.
def _pack(x: Tensor, out: Tensor, rows: Tensor, resize: str, normalize: bool) -> None:
    if _implementation(x, out) == "reference":
        reference.pack_features(x, out, rows, resize, normalize)
        return
    from dsd_fast.kernels.pack_features import kernel

    kernel.pack_features(x, out, rows, resize, normalize)


_PACK = operator(NAME, _pack, lambda *_: None, mutates=("out",))


def pack_features(x: Tensor, out: Tensor, rows: Tensor, *, mode: str = "bilinear", normalize: bool = False) -> None:
    """Feature maps resized, perhaps normalised, cast and written where they are wanted, in one pass.

    out[rows[b]] = cast(l2(resize(x[b]))); the other rows of ``out`` stay as they are. Maps that have the size of
    ``out`` are not resized. Arithmetic is float32 for 16-bit and 32-bit maps, float64 for float64; the result is
    rounded once. No gradient. Every size may be 0, save the height and width of maps that are to be resized.

    Args:
        x: (B, C, h, w) floating point, any strides; channels-last is the fast case.
        out: (R, C, H, W) of any floating-point type, contiguous, sharing no memory with x. It decides the size.
        rows: (B,) int64, the row of ``out`` for each map; none twice. On x's device, or on the CPU, where it is
            checked.
        mode: "bilinear" (corners not aligned, no antialiasing), "nearest", "area" (adaptive average) or "max"
            (adaptive maximum), as torch.nn.functional.interpolate and adaptive_max_pool2d have them.
        normalize: divide each position by the L2 norm of its channels, or by 1e-12 where that is larger, as
            torch.nn.functional.normalize does.

    Raises:
        ValueError: a shape, type, device, mode or row that does not fit, or a gradient asked for, by the argument's
            name.
    """
    rows = _check(x, out, rows, mode)
    check_transforms(NAME, x)
    _PACK(x, out, upload(rows, x.device), mode, normalize)


def _check(x: Tensor, out: Tensor, rows: Tensor, mode: str) -> Tensor:
    """What :func:`pack_features` says of its arguments; ``rows`` as int64."""
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"x: got {tuple(x.shape)} {x.dtype}, expected (B, C, h, w) of a floating-point type")
    if out.ndim != 4 or out.shape[1] != x.shape[1] or not out.dtype.is_floating_point:
        raise ValueError(
            f"out: got {tuple(out.shape)} {out.dtype}, expected (R, {x.shape[1]}, H, W) of a floating-point type"
        )
    if not out.is_contiguous():
        raise ValueError(f"out: got strides {out.stride()} of {tuple(out.shape)}, expected a contiguous tensor")
    if out.device != x.device:
        raise ValueError(f"out: on {out.device}, expected {x.device} like x")
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    if out.numel() and x.shape[0] and 0 in x.shape[2:]:
        raise ValueError(f"x: got {tuple(x.shape)}, expected positions to make {tuple(out.shape[2:])} of")
    for name, value in (("x", x), ("out", out)):
        if torch.is_grad_enabled() and value.requires_grad:
            raise ValueError(f"{name}: requires a gradient, expected a tensor without one")
    if rows.device not in (x.device, torch.device("cpu")):
        raise ValueError(f"rows: on {rows.device}, expected {x.device} like x, or the CPU")
    rows = check_index("rows", rows, (x.shape[0],), out.shape[0])
    if rows.device.type == "cpu" and not traced() and len(rows.unique()) < len(rows):
        raise ValueError(f"rows: got {rows.tolist()}, expected no row twice")
    return rows
