"""Noised latents in Triton, out[n,s,d] = signal[s]·latents[n] + sigma[s]·noise[n,s,d], and their gradients.

Letters: N images, S timesteps, D draws, E = C·h·w elements of a latent. Noise may be shared by images, by timesteps or
by both. Arithmetic is float32. Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsd_fast.kernels.common.build import Build
from dsd_fast.kernels.common.elementwise import dense
from dsd_fast.kernels.common.kernel import on

# 16 elements a thread: two loads of 16 bytes of 16-bit latents.
BLOCK, WARPS = 2048, 4

# Their value is no reason to compile anew.
SIZES = ["N", "S", "D", "n", "s", "d"]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_out,
    p_latents,
    p_noise,
    p_signal,
    p_sigma,
    N,
    S,
    D,
    E,
    stride_n,
    stride_s,
    BLOCK: tl.constexpr,
):
    """A block of one noised latent. Noise of image n and timestep s starts at n·stride_n + s·stride_s: 0 if shared.

    Programs of all images that share a draw follow each other, so that the caches hold its noise.
    """
    blocks = tl.cdiv(E, BLOCK)
    i_e = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_row = tl.program_id(0) // blocks
    i_n, i_d, i_s = (i_row % N).to(tl.int64), i_row // N % D, (i_row // N // D).to(tl.int64)
    keep = i_e < E
    signal, sigma = tl.load(p_signal + i_s), tl.load(p_sigma + i_s)
    b_clean = tl.load(p_latents + i_n * E + i_e, mask=keep, other=0.0).to(tl.float32)
    p_draw = p_noise + i_n * stride_n + i_s * stride_s + i_d.to(tl.int64) * E
    b_noise = tl.load(p_draw + i_e, mask=keep, other=0.0).to(tl.float32)
    b_out = signal * b_clean + sigma * b_noise
    tl.store(p_out + ((i_n * S + i_s) * D + i_d) * E + i_e, b_out.to(p_out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(p_sum, p_dout, p_factor, N, S, D, E, n, s, d, BLOCK: tl.constexpr):
    """A block of one row of sum (n, s, d, E): of factor[s]·dout (N, S, D, E) over what has one row there, in order."""
    blocks = tl.cdiv(E, BLOCK)
    i_e = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    keep = i_e < E
    images, timesteps, draws = N // n, S // s, D // d
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(images * timesteps * draws):
        i_d = i_row % d + i % draws
        i_s = i_row // d % s + i // draws % timesteps
        i_n = i_row // d // s + i // draws // timesteps
        p_row = p_dout + ((i_n * S + i_s) * D + i_d) * E
        b_dout = tl.load(p_row + i_e, mask=keep, other=0.0).to(tl.float32)
        b_sum += tl.load(p_factor + i_s) * b_dout
    tl.store(p_sum + i_row * E + i_e, b_sum.to(p_sum.dtype.element_ty), mask=keep)


def forward(latents: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """As reference.forward, of float32, float16 and bfloat16 latents; noise of any floating-point type."""
    (images, *latent), timesteps, draws = latents.shape, len(signal), noise.shape[2]
    out = latents.new_empty((images, timesteps, draws, *latent))
    if not out.numel():
        return out
    size, noise = latents[0].numel(), noise.contiguous()
    with on(latents.device):
        forward_kernel[_grid(images * timesteps * draws, size)](
            p_out=out,
            p_latents=dense(latents),
            p_noise=noise,
            p_signal=dense(signal),
            p_sigma=dense(sigma),
            N=images,
            S=timesteps,
            D=draws,
            E=size,
            stride_n=noise.stride(0) if noise.shape[0] == images else 0,
            stride_s=noise.stride(1) if noise.shape[1] == timesteps else 0,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out


def backward(
    dout: Tensor,
    signal: Tensor,
    sigma: Tensor,
    by_image: bool,
    by_timestep: bool,
    *,
    latents: bool = True,
    noise: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """As reference.backward: sums run in order, without atomics, so that equal inputs give equal bits."""
    images, timesteps, draws, *latent = dout.shape
    dlatents = dnoise = None
    if latents:
        dlatents = dout.new_empty((images, *latent))
        _sum(dlatents, dout, signal, (images, 1, 1))
    if noise:
        rows = (images if by_image else 1, timesteps if by_timestep else 1, draws)
        dnoise = dout.new_empty((*rows, *latent), dtype=torch.float32)
        _sum(dnoise, dout, sigma, rows)
    return dlatents, dnoise


def _sum(result: Tensor, dout: Tensor, factor: Tensor, rows: tuple[int, int, int]) -> None:
    """Writes factor·dout, summed over all of its first three axes that have one of the ``rows``, to ``result``."""
    if not dout.numel():
        result.zero_()
        return
    images, timesteps, draws, *_ = dout.shape
    size = dout[0, 0, 0].numel()
    with on(dout.device):
        backward_kernel[_grid(result.numel() // size, size)](
            p_sum=result,
            p_dout=dense(dout),
            p_factor=dense(factor),
            N=images,
            S=timesteps,
            D=draws,
            E=size,
            n=rows[0],
            s=rows[1],
            d=rows[2],
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _grid(rows: int, size: int) -> tuple[int]:
    return (rows * triton.cdiv(size, BLOCK),)


def builds() -> list[Build]:
    """Every latent of whole blocks compiles to the same code; noise and its gradient are float32."""
    found = []
    for dtype in ("fp16", "bf16", "fp32"):
        latents, sizes = f"*{dtype}", dict.fromkeys(("N", "S", "D", "E"), "i32")
        factors = {"p_signal": "*fp32", "p_sigma": "*fp32"}
        strides = {"stride_n": "i32", "stride_s": "i32"}
        rows = dict.fromkeys(("n", "s", "d"), "i32")
        for name, kernel, signature in (
            (
                "forward",
                forward_kernel,
                {"p_out": latents, "p_latents": latents, "p_noise": "*fp32", **factors, **sizes, **strides},
            ),
            (
                "backward latents",
                backward_kernel,
                {"p_sum": latents, "p_dout": latents, "p_factor": "*fp32", **sizes, **rows},
            ),
            (
                "backward noise",
                backward_kernel,
                {"p_sum": "*fp32", "p_dout": latents, "p_factor": "*fp32", **sizes, **rows},
            ),
        ):
            divisible = frozenset(signature) - set(SIZES)
            found.append(Build(f"{name} {dtype}", kernel, signature, {"BLOCK": BLOCK}, divisible, WARPS))
    return found
