"""sum = x + residual and its layer norm, y = (sum − mean)·rstd·weight + bias, and their gradient.

Letters: M rows of C channels; P parts, the programs that sum the gradients of weight and bias. A row is held in
registers, so that mean and variance take two passes over it and none over memory. Arithmetic is float32; the sum is
rounded to its type before it is normalised, as by two operators. Source: Ba et al., arXiv 1607.06450.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsd_fast.kernels.common.build import Build
from dsd_fast.kernels.common.elementwise import as_rows, dense
from dsd_fast.kernels.common.kernel import architecture, on

# Elements of a program's tile, 16 a thread of four warps, where rows are narrower than it.
TILE = 2048
# Enough programs to fill a GPU, few enough that their sums over rows are small beside the rows. A constant, so that
# equal inputs give equal bits on every GPU.
PARTS = 512

# Their value is no reason to compile anew.
SIZES = ["M", "part"]


@triton.jit
def row_statistics(b_x, keep, C, eps):
    """Mean and reciprocal standard deviation of each row of a tile that holds zeros beyond C."""
    b_mean = tl.sum(b_x, 1) / C
    b_centred = tl.where(keep, b_x - b_mean[:, None], 0.0)
    return b_mean, tl.math.rsqrt(tl.sum(b_centred * b_centred, 1) / C + eps)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_sum,
    p_y,
    p_mean,
    p_rstd,
    p_x,
    p_residual,
    p_weight,
    p_bias,
    M,
    C,
    stride_x,
    stride_residual,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sum, y, mean and rstd; sum is not written without a residual."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_c = tl.arange(0, BLOCK_C)
    keep = (i_m < M)[:, None] & (i_c < C)[None, :]
    b_x = tl.load(p_x + i_m[:, None] * stride_x + i_c[None, :], mask=keep, other=0.0).to(tl.float32)
    if p_residual is not None:
        p_row = p_residual + i_m[:, None] * stride_residual
        b_x += tl.load(p_row + i_c[None, :], mask=keep, other=0.0).to(tl.float32)
        b_sum = b_x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + i_m[:, None] * C + i_c[None, :], b_sum, mask=keep)
        b_x = b_sum.to(tl.float32)
    b_mean, b_rstd = row_statistics(b_x, keep, C, eps)
    b_y = (b_x - b_mean[:, None]) * b_rstd[:, None]
    if p_weight is not None:
        b_y *= tl.load(p_weight + i_c, mask=i_c < C, other=0.0).to(tl.float32)[None, :]
    if p_bias is not None:
        b_y += tl.load(p_bias + i_c, mask=i_c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + i_m[:, None] * C + i_c[None, :], b_y.to(p_y.dtype.element_ty), mask=keep)
    tl.store(p_mean + i_m, b_mean, mask=i_m < M)
    tl.store(p_rstd + i_m, b_rstd, mask=i_m < M)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    p_dx,
    p_dweight,
    p_dbias,
    p_dsum,
    p_dy,
    p_sum,
    p_mean,
    p_rstd,
    p_weight,
    M,
    C,
    part,
    stride_dsum,
    stride_dy,
    stride_sum,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx of ``part`` rows, and their share of dweight and dbias (P, C), where those are wanted."""
    first = tl.program_id(0).to(tl.int64) * part
    i_c = tl.arange(0, BLOCK_C)
    if p_weight is not None:
        b_weight = tl.load(p_weight + i_c, mask=i_c < C, other=0.0).to(tl.float32)[None, :]
    if p_dweight is not None:
        b_dweight = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        b_dbias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, part, BLOCK_M):
        i_m = first + start + tl.arange(0, BLOCK_M)
        keep = (i_m < M)[:, None] & (i_c < C)[None, :]
        b_mean = tl.load(p_mean + i_m, mask=i_m < M, other=0.0)[:, None]
        b_rstd = tl.load(p_rstd + i_m, mask=i_m < M, other=0.0)[:, None]
        b_sum = tl.load(p_sum + i_m[:, None] * stride_sum + i_c[None, :], mask=keep, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + i_m[:, None] * stride_dy + i_c[None, :], mask=keep, other=0.0).to(tl.float32)
        b_hat = tl.where(keep, (b_sum - b_mean) * b_rstd, 0.0)
        if p_dweight is not None:
            b_dweight += b_dy * b_hat
            b_dbias += b_dy
        b_g = b_dy
        if p_weight is not None:
            b_g = b_dy * b_weight
        b_dx = b_rstd * (b_g - tl.sum(b_g, 1)[:, None] / C - b_hat * (tl.sum(b_g * b_hat, 1)[:, None] / C))
        if p_dsum is not None:
            p_row = p_dsum + i_m[:, None] * stride_dsum
            b_dx += tl.load(p_row + i_c[None, :], mask=keep, other=0.0).to(tl.float32)
        tl.store(p_dx + i_m[:, None] * C + i_c[None, :], b_dx.to(p_dx.dtype.element_ty), mask=keep)
    if p_dweight is not None:
        i_part = tl.program_id(0).to(tl.int64) * C + i_c
        tl.store(p_dweight + i_part, tl.sum(b_dweight, 0), mask=i_c < C)
        tl.store(p_dbias + i_part, tl.sum(b_dbias, 0), mask=i_c < C)


def tiles(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps: about 16 elements a thread until a row needs all 16 warps."""
    columns = triton.next_power_of_2(width)
    return max(1, TILE // columns), columns, min(16, max(4, columns // 512))


def bound(width: int) -> dict[int, int]:
    """The most registers of a thread of the backward kernel, by architecture: with them five programs are resident."""
    return {90: 96} if tiles(width)[1] == 1024 else {}


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum (..., C), or (0,) without ``residual``; normed (..., C); mean and rstd (...), float32."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    if not x.numel():
        none = torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
        return total, y, none, none.clone()
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    rows = as_rows(x)
    residual_rows = None if residual is None else as_rows(residual)
    block_m, block_c, warps = tiles(x.shape[-1])
    with on(x.device):
        forward_kernel[(triton.cdiv(len(rows), block_m),)](
            p_sum=total,
            p_y=y,
            p_mean=mean,
            p_rstd=rstd,
            p_x=rows,
            p_residual=residual_rows,
            p_weight=dense(weight),
            p_bias=dense(bias),
            M=len(rows),
            C=x.shape[-1],
            stride_x=rows.stride(0),
            stride_residual=0 if residual_rows is None else residual_rows.stride(0),
            eps=eps,
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            num_warps=warps,
        )
    return total, y, mean, rstd


def backward(
    dsum: Tensor | None,
    dy: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (..., C); dweight and dbias (C,) float32, or (0,) unless ``parameters``."""
    width = total.shape[-1]
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    if not dx.numel():
        none = torch.zeros(width if parameters else 0, dtype=torch.float32, device=total.device)
        return dx, none, none.clone()
    rows, dy_rows = as_rows(total), as_rows(dy)
    dsum_rows = None if dsum is None else as_rows(dsum)
    block_m, block_c, warps = tiles(width)
    blocks = triton.cdiv(len(rows), block_m)
    part = block_m * (triton.cdiv(blocks, PARTS) if parameters else 1)
    parts = triton.cdiv(len(rows), part)
    sums = torch.empty((2, parts, width) if parameters else (2, 0), dtype=torch.float32, device=total.device)
    with on(total.device):
        backward_kernel[(parts,)](
            p_dx=dx,
            p_dweight=sums[0] if parameters else None,
            p_dbias=sums[1] if parameters else None,
            p_dsum=dsum_rows,
            p_dy=dy_rows,
            p_sum=rows,
            p_mean=mean,
            p_rstd=rstd,
            p_weight=dense(weight),
            M=len(rows),
            C=width,
            part=part,
            stride_dsum=0 if dsum_rows is None else dsum_rows.stride(0),
            stride_dy=dy_rows.stride(0),
            stride_sum=rows.stride(0),
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            num_warps=warps,
            maxnreg=bound(width).get(architecture(total.device)),
        )
        if parameters:
            sums = sums.sum(1)
    return dx, sums[0], sums[1]


def builds() -> list[Build]:
    """The widths of SD 1.5, 2.x and SDXL, with everything that training asks for."""
    found = []
    for dtype in ("fp16", "bf16"):
        pointer = f"*{dtype}"
        statistics = {"p_mean": "*fp32", "p_rstd": "*fp32"}
        forward_signature = {
            **dict.fromkeys(("p_sum", "p_y", "p_x", "p_residual", "p_weight", "p_bias"), pointer),
            **statistics,
            **dict.fromkeys(("M", "C", "stride_x", "stride_residual"), "i32"),
            "eps": "fp32",
        }
        backward_signature = {
            **dict.fromkeys(("p_dx", "p_dsum", "p_dy", "p_sum", "p_weight"), pointer),
            **dict.fromkeys(("p_dweight", "p_dbias"), "*fp32"),
            **statistics,
            **dict.fromkeys(("M", "C", "part", "stride_dsum", "stride_dy", "stride_sum"), "i32"),
        }
        for width in (320, 640, 1280):
            block_m, block_c, warps = tiles(width)
            for name, kernel, signature in (
                ("forward", forward_kernel, forward_signature),
                ("backward", backward_kernel, backward_signature),
            ):
                constants = {"BLOCK_M": block_m, "BLOCK_C": block_c}
                divisible = frozenset(signature) - {"M", "part", "eps"}
                most = bound(width) if name == "backward" else {}
                found.append(
                    Build(f"{name} C{width} {dtype}", kernel, signature, constants, divisible, warps, registers=most)
                )
    return found
