"""y = silu((x + shift − mean)·rstd·weight + bias) with the statistics of a group of channels of an image: the launches.

Letters: B images, C channels, G groups, D = C/G channels a group, L positions, S splits of the positions. Where a group
of an image fits into the registers of a program one pass does it (whole_kernel.py), else the positions are split over
programs (split_kernel.py). Which form, and the splits, depend on L and D alone, so that a result depends neither on its
batch nor on the GPU. Any strides are read in place where h and w step as one. Source: Wu and He, arXiv 1803.08494.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from dsd_fast.kernels.common.build import Build
from dsd_fast.kernels.common.elementwise import dense
from dsd_fast.kernels.common.kernel import on
from dsd_fast.kernels.group_norm_silu import split_kernel as split
from dsd_fast.kernels.group_norm_silu import whole_kernel as whole
from dsd_fast.kernels.group_norm_silu.reference import memory_format

# Elements of a group of an image that a program holds, 32 a thread of 16 warps; half of it where it holds dy too.
WHOLE_FORWARD, WHOLE_BACKWARD = 16384, 8192
# Positions and channels of a tile of the split form, 128 bytes of 16-bit channels in a row; where positions are dense a
# tile is long instead, so that the sums over it need few registers.
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
    x, strides = _positions(x, "x")
    strides |= _positions(y, "y")[1]
    statistics = {"p_mean": mean, "p_rstd": rstd}
    inputs = {"p_x": x, "p_weight": dense(weight), "p_bias": dense(bias), "p_shift": dense(shift)}
    block_l, block_d = triton.next_power_of_2(length), triton.next_power_of_2(width)
    with on(x.device):
        if block_l * block_d <= WHOLE_FORWARD:
            whole.group_forward_kernel[(images * groups,)](
                p_y=y,
                **statistics,
                **inputs,
                **strides,
                G=groups,
                L=length,
                eps=eps,
                D=width,
                SILU=silu,
                BLOCK_L=block_l,
                BLOCK_D=block_d,
                num_warps=_whole_warps(block_l * block_d, WHOLE_FORWARD),
            )
            return y, mean, rstd
        block_l, block_c = CHANNELS_LAST if strides["stride_xc"] == 1 else CONTIGUOUS
        size, splits = _splits(length, block_l)
        blocks = triton.cdiv(channels, block_c)
        parts = torch.empty(2, images, splits, channels, dtype=torch.float32, device=x.device)
        split.statistics_kernel[(images * splits * blocks,)](
            p_parts=parts,
            p_x=x,
            p_shift=inputs["p_shift"],
            B=images,
            C=channels,
            L=length,
            S=splits,
            split=size,
            **_only(strides, "stride_x"),
            BLOCK_L=block_l,
            BLOCK_C=block_c,
            num_warps=WARPS,
        )
        split.combine_kernel[(images * groups,)](
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
        split.apply_kernel[(images * triton.cdiv(length, block_l) * blocks,)](
            p_y=y,
            **statistics,
            **inputs,
            **strides,
            G=groups,
            C=channels,
            D=width,
            L=length,
            SILU=silu,
            BLOCK_L=block_l,
            BLOCK_C=block_c,
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
    sums = torch.empty(2, images, channels, dtype=torch.float32, device=x.device)
    dy, strides = _positions(dy, "y")
    x, x_strides = _positions(x, "x")
    strides |= x_strides | _positions(dx, "d")[1]
    inputs = {
        "p_dy": dy,
        "p_x": x,
        "p_mean": mean,
        "p_rstd": rstd,
        "p_weight": dense(weight),
        "p_bias": dense(bias),
        "p_shift": dense(shift),
    }
    p_sums, p_dshift = sums if parameters else None, None if shift is None else dshift
    block_l, block_d = triton.next_power_of_2(length), triton.next_power_of_2(width)
    with on(x.device):
        if block_l * block_d <= WHOLE_BACKWARD:
            whole.group_backward_kernel[(images * groups,)](
                p_dx=dx,
                p_sums=p_sums,
                p_dshift=p_dshift,
                **inputs,
                **strides,
                B=images,
                G=groups,
                L=length,
                D=width,
                SILU=silu,
                BLOCK_L=block_l,
                BLOCK_D=block_d,
                num_warps=_whole_warps(block_l * block_d, WHOLE_BACKWARD),
            )
        else:
            block_l, block_c = CHANNELS_LAST if strides["stride_xc"] == 1 else CONTIGUOUS
            size, splits = _splits(length, block_l)
            blocks = triton.cdiv(channels, block_c)
            parts = torch.empty(3, images, splits, channels, dtype=torch.float32, device=x.device)
            means = torch.empty(2, images, groups, dtype=torch.float32, device=x.device)
            sizes = {"B": images, "G": groups, "D": width, "L": length}
            tile = {"SILU": silu, "BLOCK_L": block_l, "BLOCK_C": block_c, "num_warps": WARPS}
            split.channel_gradients_kernel[(images * splits * blocks,)](
                p_parts=parts,
                **inputs,
                **_only(strides, "stride_x", "stride_y"),
                **sizes,
                C=channels,
                S=splits,
                split=size,
                **tile,
            )
            split.combine_gradients_kernel[(images * groups,)](
                p_means=means,
                p_sums=p_sums,
                p_dshift=p_dshift,
                p_parts=parts,
                p_rstd=rstd,
                p_weight=inputs["p_weight"],
                **sizes,
                S=splits,
                **_combine_blocks(width, splits),
                num_warps=WARPS,
            )
            split.apply_gradients_kernel[(images * triton.cdiv(length, block_l) * blocks,)](
                p_dx=dx, p_means=means, **inputs, **strides, **sizes, C=channels, **tile
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


def _only(strides: dict[str, int], *prefixes: str) -> dict[str, int]:
    return {name: value for name, value in strides.items() if name.startswith(prefixes)}


def _whole_warps(elements: int, most: int) -> int:
    return min(16, max(4, 16 * elements // most))


def _splits(length: int, block: int) -> tuple[int, int]:
    """Positions of a split, a multiple of the ``block`` of a tile, and how many splits there are."""
    size = triton.cdiv(triton.cdiv(length, SPLITS), block) * block
    return size, triton.cdiv(length, size)


def _combine_blocks(width: int, splits: int) -> dict[str, int]:
    return {"BLOCK_S": triton.next_power_of_2(splits), "BLOCK_D": min(BLOCK_D, triton.next_power_of_2(width))}


def builds() -> list[Build]:
    """SD's groups of 10 to 80 channels with all inputs: whole at 8 × 8 and 16 × 16 positions, split above."""
    found = []
    for dtype in ("fp16", "bf16"):
        for length, width in ((64, 40), (64, 80), (256, 20), (256, 40), (256, 60)):
            block_d = triton.next_power_of_2(width)
            for direction, kernel, most in (
                ("forward", whole.group_forward_kernel, WHOLE_FORWARD),
                ("backward", whole.group_backward_kernel, WHOLE_BACKWARD),
            ):
                if length * block_d <= most:
                    tile = {"D": width, "SILU": True, "BLOCK_L": length, "BLOCK_D": block_d}
                    name = f"{direction} whole D{width} L{length} {dtype}"
                    found.append(_build(name, kernel, dtype, tile, _whole_warps(length * block_d, most)))
        for layout, (block_l, block_c) in (("channels-last", CHANNELS_LAST), ("contiguous", CONTIGUOUS)):
            tile = {"BLOCK_L": block_l, "BLOCK_C": block_c}
            for name, kernel, constants in (
                ("forward split statistics", split.statistics_kernel, tile),
                ("forward split apply", split.apply_kernel, tile | {"SILU": True}),
                ("backward split channels", split.channel_gradients_kernel, tile | {"SILU": True}),
                ("backward split apply", split.apply_gradients_kernel, tile | {"SILU": True}),
            ):
                found.append(_build(f"{name} {layout} {dtype}", kernel, dtype, constants, WARPS, layout))
        for name, kernel in (
            ("forward split combine", split.combine_kernel),
            ("backward split combine", split.combine_gradients_kernel),
        ):
            found.append(_build(f"{name} {dtype}", kernel, dtype, _combine_blocks(80, SPLITS), WARPS))
    return found


def _build(
    name: str, kernel: Any, dtype: str, constants: dict[str, Any], warps: int, layout: str = "channels-last"
) -> Build:
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
    return Build(name, kernel, signature, constants, divisible, warps)
