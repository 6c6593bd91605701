"""GEGLU, y = value·gelu(gate) with gelu(g) = g·Φ(g), and its gradient.

Letters: x (M, 2N), of which the first N columns are the value and the others the gate; y (M, N). Arithmetic is
float32; erf is exact to float32. Source: Shazeer, arXiv 2002.05202, in the form of diffusers' GEGLU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsd_fast.kernels.common.build import Build
from dsd_fast.kernels.common.elementwise import as_rows
from dsd_fast.kernels.common.kernel import on

# 16 elements a thread: two loads of 16 bytes of each half in flight. The widths of SD are multiples of 256.
BLOCK_M, BLOCK_N, WARPS = 8, 256, 4

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)

# Its value is no reason to compile anew.
SIZES = ["M"]


@triton.jit
def locate(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows, columns and mask of this program's tile."""
    blocks = tl.cdiv(N, BLOCK_N)
    i_m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    return i_m[:, None], i_n[None, :], (i_m < M)[:, None] & (i_n < N)[None, :]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(p_y, p_x, M, N, stride_x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y from x; a row of x starts ``stride_x`` elements after the one before."""
    i_m, i_n, keep = locate(M, N, BLOCK_M, BLOCK_N)
    p_value = p_x + i_m * stride_x + i_n
    b_value = tl.load(p_value, mask=keep, other=0.0).to(tl.float32)
    b_gate = tl.load(p_value + N, mask=keep, other=0.0).to(tl.float32)
    b_cdf = 0.5 + 0.5 * tl.math.erf(b_gate * SQRT_HALF)
    tl.store(p_y + i_m * N + i_n, (b_value * (b_gate * b_cdf)).to(p_y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(p_dx, p_dy, p_x, M, N, stride_dy, stride_x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dx from dy and x: dvalue = dy·g·Φ(g), dgate = dy·value·(Φ(g) + g·φ(g))."""
    i_m, i_n, keep = locate(M, N, BLOCK_M, BLOCK_N)
    p_value = p_x + i_m * stride_x + i_n
    b_dy = tl.load(p_dy + i_m * stride_dy + i_n, mask=keep, other=0.0).to(tl.float32)
    b_value = tl.load(p_value, mask=keep, other=0.0).to(tl.float32)
    b_gate = tl.load(p_value + N, mask=keep, other=0.0).to(tl.float32)
    b_cdf = 0.5 + 0.5 * tl.math.erf(b_gate * SQRT_HALF)
    b_density = tl.exp(-0.5 * b_gate * b_gate) * INV_SQRT_2PI
    p_dvalue = p_dx + i_m * (2 * N) + i_n
    tl.store(p_dvalue, (b_dy * (b_gate * b_cdf)).to(p_dx.dtype.element_ty), mask=keep)
    b_dgate = b_dy * b_value * (b_cdf + b_gate * b_density)
    tl.store(p_dvalue + N, b_dgate.to(p_dx.dtype.element_ty), mask=keep)


def forward(x: Tensor) -> Tensor:
    """y (..., N) from x (..., 2N), any strides."""
    width = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    if y.numel():
        rows = as_rows(x)
        with on(x.device):
            forward_kernel[_grid(len(rows), width)](
                p_y=y,
                p_x=rows,
                M=len(rows),
                N=width,
                stride_x=rows.stride(0),
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                num_warps=WARPS,
            )
    return y


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """dx (..., 2N) from dy (..., N) and x (..., 2N), any strides."""
    width = x.shape[-1] // 2
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        rows, drows = as_rows(x), as_rows(dy)
        with on(x.device):
            backward_kernel[_grid(len(rows), width)](
                p_dx=dx,
                p_dy=drows,
                p_x=rows,
                M=len(rows),
                N=width,
                stride_dy=drows.stride(0),
                stride_x=rows.stride(0),
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                num_warps=WARPS,
            )
    return dx


def _grid(rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(rows, BLOCK_M) * triton.cdiv(width, BLOCK_N),)


def builds() -> list[Build]:
    """Every width of SD compiles to the same code: all are multiples of 16."""
    found = []
    for dtype in ("fp16", "bf16"):
        pointer, tiles = f"*{dtype}", {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
        sizes = {"M": "i32", "N": "i32", "stride_x": "i32"}
        forward_signature = {"p_y": pointer, "p_x": pointer, **sizes}
        backward_signature = {"p_dx": pointer, "p_dy": pointer, "p_x": pointer, **sizes, "stride_dy": "i32"}
        for name, kernel, signature in (
            ("forward", forward_kernel, forward_signature),
            ("backward", backward_kernel, backward_signature),
        ):
            divisible = frozenset(signature) - {"M"}
            found.append(Build(f"{name} {dtype}", kernel, signature, tiles, divisible, WARPS))
    return found
