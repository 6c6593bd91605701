"""y = silu((x + shift − mean)·rstd·weight + bias) with the statistics of a group of channels of an image: the launches.

Letters: B images, C channels, G groups, D = C/G channels a group, L positions, S splits of the positions. The positions
are split over programs, whose sums another kernel adds up in order (forward_kernel.py, backward_kernel.py). The splits
depend on L and the layout alone, so that a result depends neither on its batch nor on the GPU. Any strides are read in
place where h and w step as one. Source: Wu and He, arXiv 1803.08494.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from dsd_fast.kernels.common.build import Build
from dsd_fast.kernels.common.elementwise import dense
from dsd_fast.kernels.common.kernel import on
from dsd_fast.kernels.group_norm_silu.backward_kernel import (
    apply_gradients_kernel,
    channel_gradients_kernel,
    combine_gradients_kernel,
)
from dsd_fast.kernels.group_norm_silu.forward_kernel import apply_kernel, combine_kernel, statistics_kernel
from dsd_fast.kernels.group_norm_silu.reference import memory_format

# Positions and channels of a tile, 128 bytes of 16-bit channels in a row; where positions are dense a tile is long
# instead, so that the sums over it need few registers.
CHANNELS_LAST, CONTIGUOUS = (64, 64), (256, 8)
WARPS = 4
SPLITS = 32
# Channels of a group that the kernels which add up the splits take at a time.
BLOCK_D = 32


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, C, h, w) in x's type and memory format; mean and rstd (B, G) float32."""
    images, channels, length, width = _sizes(x, groups)
    y = torch.empty_like(x, memory_format=memory_format(x))
    if not x.numel():
        none = torch.zeros(images, groups, dtype=torch.float32, device=x.device)
        return y, none, none.clone()
    mean, rstd = (torch.empty(images, groups, dtype=torch.float32, device=x.device) for _ in range(2))
    x, x_strides = _positions(x, "x")
    y_strides = _positions(y, "y")[1]
    statistics = {"p_mean": mean, "p_rstd": rstd}
    p_shift = dense(shift)
    tile, size, splits = _split(length, x_strides)
    blocks = triton.cdiv(channels, tile["BLOCK_C"])
    parts = torch.empty(2, images, splits, channels, dtype=torch.float32, device=x.device)
    with on(x.device):
        statistics_kernel[(images * splits * blocks,)](
            p_parts=parts,
            p_x=x,
            p_shift=p_shift,
            B=images,
            C=channels,
            L=length,
            S=splits,
            split=size,
            **x_strides,
            **tile,
            num_warps=WARPS,
        )
        combine_kernel[(images * groups,)](
            **statistics,
            p_parts=parts,
            B=images,
            G=groups,
            D=width,
            L=length,
            S=splits,
            split=size,
            eps=eps,
            **_combine_blocks(width, splits),
            num_warps=WARPS,
        )
        apply_kernel[(images * triton.cdiv(length, tile["BLOCK_L"]) * blocks,)](
            p_y=y,
            **statistics,
            p_x=x,
            p_weight=dense(weight),
            p_bias=dense(bias),
            p_shift=p_shift,
            G=groups,
            C=channels,
            D=width,
            L=length,
            **x_strides,
            **y_strides,
            SILU=silu,
            **tile,
            num_warps=WARPS,
        )
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    groups: int,
    silu: bool,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx in x's type and memory format; float32 dweight, dbias (C,), (0,) unless ``parameters``; dshift (B, C) or (0,).

    Every image gives its sums over positions; torch adds up those of the images, in a fixed order.
    """
    images, channels, length, width = _sizes(x, groups)
    dx = torch.empty_like(x, memory_format=memory_format(x))
    dshift = torch.empty(0 if shift is None else (images, channels), dtype=torch.float32, device=x.device)
    if not x.numel():
        none = torch.zeros(channels if parameters else 0, dtype=torch.float32, device=x.device)
        return dx, none, none.clone(), dshift.zero_()
    dy, y_strides = _positions(dy, "y")
    x, x_strides = _positions(x, "x")
    strides = y_strides | x_strides
    inputs = {
        "p_dy": dy,
        "p_x": x,
        "p_mean": mean,
        "p_rstd": rstd,
        "p_weight": dense(weight),
        "p_bias": dense(bias),
        "p_shift": dense(shift),
    }
    sizes = {"B": images, "G": groups, "D": width, "L": length}
    tile, size, splits = _split(length, x_strides)
    blocks = triton.cdiv(channels, tile["BLOCK_C"])
    parts = torch.empty(3, images, splits, channels, dtype=torch.float32, device=x.device)
    means = torch.empty(2, images, groups, dtype=torch.float32, device=x.device)
    sums = torch.empty(2, images, channels, dtype=torch.float32, device=x.device)
    with on(x.device):
        channel_gradients_kernel[(images * splits * blocks,)](
            p_parts=parts,
            **inputs,
            **sizes,
            C=channels,
            S=splits,
            split=size,
            **strides,
            SILU=silu,
            **tile,
            num_warps=WARPS,
        )
        combine_gradients_kernel[(images * groups,)](
            p_means=means,
            p_sums=sums if parameters else None,
            p_dshift=None if shift is None else dshift,
            p_parts=parts,
            p_rstd=rstd,
            p_weight=inputs["p_weight"],
            **sizes,
            S=splits,
            **_combine_blocks(width, splits),
            num_warps=WARPS,
        )
        apply_gradients_kernel[(images * triton.cdiv(length, tile["BLOCK_L"]) * blocks,)](
            p_dx=dx,
            p_means=means,
            **inputs,
            **sizes,
            C=channels,
            **strides,
            **_positions(dx, "d")[1],
            SILU=silu,
            **tile,
            num_warps=WARPS,
        )
        if not parameters:
            return dx, sums.new_empty(0), sums.new_empty(0), dshift
        dbias, dweight = sums.sum(1)
    return dx, dweight, dbias, dshift


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """B, C, L and D."""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3], x.shape[1] // groups


def _positions(x: Tensor, name: str) -> tuple[Tensor, dict[str, int]]:
    """x, or a copy whose h and w step as one, and its strides by the names of the kernels' arguments."""
    height, width = x.shape[2:]
    stride_b, stride_c, stride_h, stride_w = x.stride()
    if height > 1 and width > 1 and stride_h != width * stride_w:
        return _positions(x.contiguous(memory_format=memory_format(x)), name)
    step = stride_h if width == 1 else stride_w
    return x, {f"stride_{name}b": stride_b, f"stride_{name}c": stride_c, f"stride_{name}l": step}


def _split(length: int, x_strides: dict[str, int]) -> tuple[dict[str, int], int, int]:
    """The tile of the kernels that read x; positions of a split, whole tiles; and how many splits there are."""
    block_l, block_c = CHANNELS_LAST if x_strides["stride_xc"] == 1 else CONTIGUOUS
    size = triton.cdiv(triton.cdiv(length, SPLITS), block_l) * block_l
    return {"BLOCK_L": block_l, "BLOCK_C": block_c}, size, triton.cdiv(length, size)


def _combine_blocks(width: int, splits: int) -> dict[str, int]:
    return {"BLOCK_S": triton.next_power_of_2(splits), "BLOCK_D": min(BLOCK_D, triton.next_power_of_2(width))}


def builds() -> list[Build]:
    """Groups of 80 channels, SD's widest, with all inputs; sums over one split, as at 8 × 8 positions, and over all."""
    found = []
    for dtype in ("fp16", "bf16"):
        for layout, (block_l, block_c) in (("channels-last", CHANNELS_LAST), ("contiguous", CONTIGUOUS)):
            tile = {"BLOCK_L": block_l, "BLOCK_C": block_c}
            for name, kernel, constants in (
                ("forward statistics", statistics_kernel, tile),
                ("forward apply", apply_kernel, tile | {"SILU": True}),
                ("backward channels", channel_gradients_kernel, tile | {"SILU": True}),
                ("backward apply", apply_gradients_kernel, tile | {"SILU": True}),
            ):
                found.append(_build(f"{name} {layout} {dtype}", kernel, dtype, constants, layout))
        for name, kernel in (("forward combine", combine_kernel), ("backward combine", combine_gradients_kernel)):
            for splits in (1, SPLITS):
                found.append(_build(f"{name} S{splits} {dtype}", kernel, dtype, _combine_blocks(80, splits)))
    return found


def _build(name: str, kernel: Any, dtype: str, constants: dict[str, Any], layout: str = "channels-last") -> Build:
    """Of a launch with images in ``layout``, whose smallest step is 1, which Triton takes for a constant."""
    floats = {"p_mean", "p_rstd", "p_parts", "p_sums", "p_means", "p_dshift"}
    dense_axis = "c" if layout == "channels-last" else "l"
    signature, constants = {}, dict(constants)
    for argument in kernel.arg_names:
        if argument.startswith("stride_") and argument.endswith(dense_axis):
            constants[argument] = 1
        elif argument not in constants:
            kind = "*fp32" if argument in floats else f"*{dtype}" if argument.startswith("p_") else "i32"
            signature[argument] = "fp32" if argument == "eps" else kind
    multiples = {p.name for p in kernel.params if p.name in ("C", "L", "split") and not p.do_not_specialize}
    divisible = frozenset(n for n in signature if n in multiples or n.startswith(("p_", "stride_")))
    return Build(name, kernel, signature, constants, divisible, WARPS)
