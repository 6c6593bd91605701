"""Cross-attention with its score in Triton: the launches, and what they are tuned to.

    S[l,t] = scale · q[l]·k[t] + key_bias[t]     score = lse = log Σ_t exp S     O[l] = Σ_t exp(S − lse) v[t]

Letters: B rows, M texts, H heads, D head width, L image positions, T text tokens. The kernels stand in
forward_kernel.py, query_kernel.py and text_kernel.py; README.md derives what they cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dsd_fast.kernels.common.build import Build
from dsd_fast.kernels.common.kernel import (
    SMALLEST,
    WHOLE,
    WIDTHS,
    Launch,
    blocks_of_span,
    build,
    inputs,
    on,
    options,
    packed,
    split,
    widest,
)
from dsd_fast.kernels.cross_attention_score.forward_kernel import forward_kernel, forward_loop_kernel, mean_kernel
from dsd_fast.kernels.cross_attention_score.query_kernel import query_kernel, query_loop_kernel
from dsd_fast.kernels.cross_attention_score.text_kernel import segment_sum_kernel, text_kernel

WHOLE_BYTES = 60 * 1024
"""The most memory for the keys and values of a head and text that one tile holds: then programs fit into 99 KiB of
shared memory, what the smallest of the GPUs since Ampere has. Beyond it, and above 128 tokens, keys are streamed."""

TILE = 64
TILE_FLOAT32 = 16
"""Keys of a tile of forward_loop_kernel."""

LAUNCHES = {
    40: Launch(block=64, warps=4, stages=2, resident={80: 3, 90: 5, 100: 2}, alone=3.7),
    64: Launch(block=64, warps=4, stages=2, resident={80: 3, 90: 5, 100: 2}, alone=2.5),
    80: Launch(block=64, warps=4, stages=2, resident={80: 2, 90: 4, 100: 2}, alone=2.2, registers={90: 128}),
    128: Launch(block=64, warps=4, stages=2, resident={80: 2, 90: 2, 100: 2}, alone=1.0),
    160: Launch(block=64, warps=4, stages=1, resident={80: 2, 90: 2, 100: 1}, alone=0.95),
    256: Launch(block=32, warps=8, stages=1),
}
"""Launch of the 16-bit kernels by the largest width that it serves."""

SCORE_LAUNCHES = {
    40: Launch(block=64, warps=4, stages=2, resident={80: 6, 90: 7, 100: 4}, alone=5.4),
    64: Launch(block=64, warps=4, stages=2, resident={80: 4, 90: 7, 100: 7}, alone=4.2),
    80: Launch(block=64, warps=4, stages=2, resident={80: 4, 90: 6, 100: 4}, alone=3.5),
    128: Launch(block=64, warps=4, stages=2, resident={80: 4, 90: 4, 100: 4}, alone=2.4),
    160: Launch(block=64, warps=4, stages=1, resident={80: 3, 90: 4, 100: 4}, alone=2.4),
    256: Launch(block=32, warps=8, stages=1),
}
"""The same for the score alone."""

LAUNCH_FLOAT32 = Launch(block=32, warps=8, stages=1)


@dataclass(frozen=True)
class TextLaunch(Launch):
    """Of text_kernel: also the keys of a tile, and whether one launch makes dk and dv: dO and P then serve both."""

    tile: int
    together: bool


QUERY_LAUNCHES = {
    40: Launch(block=64, warps=4, stages=2, resident={80: 2, 90: 2, 100: 2}, alone=1.7),
    64: Launch(block=64, warps=4, stages=3, resident={80: 2, 90: 2, 100: 2}, alone=1.5),
    80: Launch(block=64, warps=4, stages=1, resident={80: 2, 90: 2, 100: 1}, alone=1.7),
    128: Launch(block=32, warps=4, stages=1, resident={80: 2, 90: 2, 100: 2}),
}
"""Launch of query_kernel by the largest width that it serves; keys of wider heads are streamed."""

LOOP_LAUNCH = Launch(block=64, warps=4, stages=1)
LOOP_LAUNCH_FLOAT32 = Launch(block=32, warps=8, stages=1)
LOOP_TILE = 16
"""Launches of query_loop_kernel, and the keys of its tiles."""

TEXT_LAUNCHES = {
    40: TextLaunch(
        block=32,
        warps=4,
        stages=2,
        tile=64,
        together=True,
        resident={80: 2, 90: 4, 100: 2},
        alone=3.0,
        registers={90: 128},
    ),
    64: TextLaunch(block=64, warps=4, stages=2, tile=64, together=True, resident={80: 2, 90: 2, 100: 2}, alone=1.7),
    80: TextLaunch(block=32, warps=4, stages=2, tile=32, together=True, resident={80: 2, 90: 2, 100: 2}, alone=1.3),
    128: TextLaunch(block=32, warps=4, stages=2, tile=64, together=True, resident={80: 2, 90: 2, 100: 2}, alone=1.5),
    256: TextLaunch(block=32, warps=4, stages=1, tile=32, together=False, resident={80: 2, 90: 2, 100: 2}),
}
"""Launch of text_kernel in 16 bits by the largest width it serves."""

TEXT_LAUNCH_FLOAT32 = TextLaunch(block=16, warps=8, stages=1, tile=16, together=False)

TUNING_CANDIDATES: Mapping[str, Sequence[Launch]] = {
    "LAUNCHES": [
        Launch(block, warps, stages) for block, warps in ((64, 4), (128, 4), (128, 8)) for stages in (1, 2, 3)
    ],
    "QUERY_LAUNCHES": [
        Launch(block, warps, stages) for block, warps in ((32, 4), (64, 4), (64, 8), (128, 8)) for stages in (1, 2, 3)
    ],
    "TEXT_LAUNCHES": [
        TextLaunch(block, warps, stages, tile, together)
        for block, warps in ((32, 4), (64, 4), (64, 8))
        for stages in (1, 2, 3)
        for tile in (32, 64)
        for together in (True, False)
    ],
}
"""What to time on a GPU, by the table that an entry would change; those with a stack frame cannot be taken."""

SUM_BLOCK = 1024
MEAN_BLOCK = 1024

TEXT_PROGRAMS = 4
"""The most programs of text_kernel for each multiprocessor: each span more is a part more of dk and dv to hold."""

TEXT_START = 2.4
"""What a program of text_kernel takes besides its blocks, in blocks: its part of dk and dv is written and added."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    text_index: Tensor | None,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    score_mask: Tensor | None,
    heads: int,
    scale: float,
    mean: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.forward; ``text_index`` None: row b has text b. Float32, float16 and bfloat16, D from 1 to 256."""
    rows, length, channels = q.shape
    tokens, width = k.shape[1], channels // heads
    launch = launch_for(q.dtype, width, output=v is not None)
    blocks = triton.cdiv(length, launch.block)
    out = q.new_empty(q.shape if v is not None else (0,))
    kept = (1 if score_mask is None else 2) if save else 0
    saved = q.new_empty((kept, rows, heads, length), dtype=torch.float32)
    # What is saved last is the score of each position: a mean is taken of it.
    score = saved[-1] if mean and save else q.new_empty((rows, heads, length), dtype=torch.float32)
    if rows * length == 0:
        return out, q.new_zeros((rows, heads), dtype=torch.float32) if mean else score, saved
    if scale < 0:
        q, scale = -q, -scale
    common = {
        **inputs(q, k, text_index, text_length, key_bias, heads, scale),
        **_values(v, score_mask),
        **options(launch, q.device),
        "p_out": out if v is not None else None,
        "p_score": None if mean and save else score,
        "p_saved": saved if save else None,
    }
    with on(q.device):
        if whole(q.dtype, width, tokens):
            t0, t1 = split(tokens)
            span = blocks_of_span(q.device, launch, rows * heads, blocks) * launch.block
            grid = (triton.cdiv(length, span) * rows * heads,)
            forward_kernel[grid](**common, span=span, T0=t0, T1=t1)
        else:
            tile = TILE_FLOAT32 if q.dtype == torch.float32 else TILE
            forward_loop_kernel[(blocks * rows * heads,)](**common, T0=tile)
        if mean:
            means = score.new_empty(rows, heads)
            mean_kernel[(rows * heads,)](means, score, length, BLOCK=MEAN_BLOCK)
            score = means
    return out, score, saved


def backward(
    dout: Tensor | None,
    dscore: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    text_index: Tensor | None,
    text_length: Tensor | None,
    key_bias: Tensor | None,
    score_mask: Tensor | None,
    saved: Tensor,
    heads: int,
    scale: float,
    mean: bool,
    *,
    tokens: Tensor | None = None,
    query: bool = True,
    text: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As reference.backward; None instead of what is not asked for, or has nothing to be the gradient of.

    Args:
        tokens: (B, n) int64: ``dout`` is the gradient (B, n, L) of token_maps, and there is no ``v``.
        query: make dq.
        text: make dk, with values dv, and with a bias dkey_bias.
    """
    rows, length, _ = q.shape
    if rows * length * k.shape[1] == 0 or (dout is None and dscore is None):
        return (
            q.new_zeros(q.shape) if query else None,
            k.new_zeros(k.shape) if text else None,
            v.new_zeros(v.shape) if text and v is not None else None,
            k.new_zeros(k.shape[:2], dtype=torch.float32) if text and key_bias is not None else None,
        )
    negative = scale < 0
    if negative:
        q, scale = -q, -scale
    if dout is not None:
        dout = dout.contiguous() if tokens is not None else packed(dout)
    arguments = {
        **inputs(q, k, text_index, text_length, key_bias, heads, scale),
        # Without a gradient of the output the values play no part.
        **_values(None if dout is None else v, score_mask),
        "MEAN": mean,
        "p_dout": dout,
        "p_dscore": None if dscore is None else dscore.contiguous(),
        "p_tokens": tokens,
        "p_saved": saved,
        "n": 0 if tokens is None else tokens.shape[1],
        "stride_ob": 0 if dout is None else dout.stride(0),
        "stride_ol": 0 if dout is None else dout.stride(1),
    }
    dq = q.new_empty(q.shape) if query else None
    delta = q.new_empty((rows, heads, length), dtype=torch.float32) if text and dout is not None else None
    dk = dv = dbias = None
    with on(q.device):
        if dq is not None or delta is not None:
            _launch_queries(dq, delta, arguments)
        if text:
            dk, dv, dbias = _launch_texts(delta, arguments, k.shape[0])
    if text and v is not None and dv is None:
        dv = v.new_zeros(v.shape)
    return -dq if negative and dq is not None else dq, dk, dv, dbias


def _values(v: Tensor | None, score_mask: Tensor | None) -> dict[str, Any]:
    v = None if v is None else packed(v)
    return {
        "p_v": v,
        "p_mask": None if score_mask is None else score_mask.contiguous(),
        "stride_vm": 0 if v is None else v.stride(0),
        "stride_vt": 0 if v is None else v.stride(1),
    }


def _launch_queries(dq: Tensor | None, delta: Tensor | None, arguments: dict[str, Any]) -> None:
    q, width, tokens = arguments["p_q"], arguments["D"], arguments["T"]
    rows, length, heads = arguments["B"], arguments["L"], arguments["H"]
    launch = query_launch(q.dtype, width, tokens)
    outputs = {"p_dq": dq, "p_new_delta": delta, **options(launch or loop_launch(q.dtype), q.device)}
    blocks = triton.cdiv(length, outputs["BLOCK"])
    if launch is None:
        query_loop_kernel[(blocks * rows * heads,)](**outputs, **arguments, T0=LOOP_TILE)
        return
    span = blocks_of_span(q.device, launch, rows * heads, blocks) * launch.block
    t0, t1 = split(tokens)
    grid = (triton.cdiv(length, span) * rows * heads,)
    query_kernel[grid](**outputs, **arguments, span=span, T0=t0, T1=t1)


def _launch_texts(
    delta: Tensor | None, arguments: dict[str, Any], count: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    q, k, v, index = (arguments[name] for name in ("p_q", "p_k", "p_v", "p_index"))
    rows, length, heads, tokens = (arguments[name] for name in "BLHT")
    launch = text_launch(q.dtype, arguments["D"])
    t1 = rest_tile(tokens, launch.tile)
    tiles = tokens // launch.tile + (t1 > 0)
    blocks = triton.cdiv(length, launch.block)
    programs = rows * heads * tiles
    span = blocks_of_span(q.device, launch, programs, blocks, TEXT_PROGRAMS, TEXT_START) * launch.block
    spans = triton.cdiv(length, span)

    # Where a text has one row and one span, its part is the sum.
    whole = index is None and spans == 1
    shape = k.shape if whole else (rows, spans, *k.shape[1:])
    kind = k.dtype if whole else torch.float32
    dk = k.new_empty(shape, dtype=kind)
    dv = None if v is None else k.new_empty(shape, dtype=kind)
    dbias = None if arguments["p_bias"] is None else k.new_empty((rows, spans, heads, tokens), dtype=torch.float32)
    common = {**arguments, **options(launch, q.device), "p_delta": delta, "span": span, "T0": launch.tile, "T1": t1}
    grid = (spans * rows * heads * tiles,)
    if launch.together or dv is None:
        text_kernel[grid](p_dk=dk, p_dv=dv, p_dbias=dbias, **common)
    else:
        text_kernel[grid](p_dk=dk, p_dv=None, p_dbias=dbias, **common)
        text_kernel[grid](**common | {"p_dk": None, "p_dv": dv, "p_dbias": None, "p_delta": None})

    order = start = None
    if index is not None:
        texts_in_order, order = torch.sort(index, stable=True)
        start = torch.searchsorted(texts_in_order, torch.arange(count + 1, device=index.device))
    if not whole:
        dk = segment_sum(dk, k.new_empty(k.shape), spans, order, start)
        dv = None if dv is None else segment_sum(dv, k.new_empty(k.shape), spans, order, start)
    if dbias is not None:
        total = k.new_empty(k.shape[:2], dtype=torch.float32)
        dbias = segment_sum(dbias, total, spans * heads, order, start)
    return dk, dv, dbias


def segment_sum(part: Tensor, total: Tensor, parts: int, order: Tensor | None, start: Tensor | None) -> Tensor:
    if total.numel():
        width = total.numel() // total.shape[0]
        grid = (triton.cdiv(width, SUM_BLOCK) * total.shape[0],)
        segment_sum_kernel[grid](total, part, order, start, parts, width, BLOCK=SUM_BLOCK)
    return total


def launch_for(dtype: torch.dtype, width: int, output: bool = True) -> Launch:
    """The launch of the forward kernels for heads of ``width``, with an output or for the score alone."""
    if dtype == torch.float32:
        return LAUNCH_FLOAT32
    return widest(LAUNCHES if output else SCORE_LAUNCHES, width)


def whole(dtype: torch.dtype, width: int, tokens: int) -> bool:
    """Whether all keys of a text, and their values, are one tile."""
    return tokens <= WHOLE and 2 * sum(split(tokens)) * sum(split(width)) * dtype.itemsize <= WHOLE_BYTES


def loop_launch(dtype: torch.dtype) -> Launch:
    """The launch of query_loop_kernel."""
    return LOOP_LAUNCH_FLOAT32 if dtype == torch.float32 else LOOP_LAUNCH


def query_launch(dtype: torch.dtype, width: int, tokens: int) -> Launch | None:
    """The launch of query_kernel; None where query_loop_kernel takes over."""
    if width > max(QUERY_LAUNCHES) or not whole(dtype, width, tokens):
        return None
    return widest(QUERY_LAUNCHES, width)


def text_launch(dtype: torch.dtype, width: int) -> TextLaunch:
    """The launch of text_kernel."""
    launch = TEXT_LAUNCH_FLOAT32 if dtype == torch.float32 else widest(TEXT_LAUNCHES, width)
    assert isinstance(launch, TextLaunch)
    return launch


def rest_tile(tokens: int, tile: int) -> int:
    """The size of the tile that holds the keys beyond the last whole tile; 0 where there are none."""
    rest = tokens % tile
    return max(SMALLEST, triton.next_power_of_2(rest)) if rest else 0


def builds() -> list[Build]:
    """What a launch with 77 tokens compiles, at the widths of SD 1.5, 2.x and SDXL, in both 16-bit types."""
    kinds = {
        "output and score": {"p_saved"},
        "score alone": {"p_saved", "p_v", "p_out"},
        "output and score, kept for gradients": {"p_score"},
    }
    forward_builds = [
        build(
            f"{kind}, D {width}, {dtype}",
            forward_kernel,
            dtype,
            launch_for(torch.float16, width, output="output" in kind),
            {"p_length", "p_bias", "p_mask"} | absent,
            width=width,
            tokens=77,
        )
        for kind, absent in kinds.items()
        for width in WIDTHS
        for dtype in ("bf16", "fp16")
    ]
    return forward_builds + backward_builds()


def backward_builds() -> list[Build]:
    """What a backward pass with 77 tokens compiles, at the widths of SD 1.5, 2.x and SDXL, in both 16-bit types."""
    return [
        found
        for kind, absent in (("output and mean", set[str]()), ("mean alone", {"p_dout", "p_v", "p_delta"}))
        for width in WIDTHS
        for dtype in ("bf16", "fp16")
        for found in _builds(
            kind, f"D {width}, {dtype}", dtype, width, absent | {"p_length", "p_bias", "p_mask", "p_tokens"}
        )
    ]


def _builds(kind: str, what: str, dtype: str, width: int, absent: set[str]) -> list[Build]:
    shape = {"width": width, "tokens": 77, "MEAN": True}
    without = absent | {"p_new_delta"} if "p_dout" in absent else absent
    launch = query_launch(torch.float16, width, 77)
    if launch is None:
        found = [build(f"dq of {kind}, {what}", query_loop_kernel, dtype, LOOP_LAUNCH, without, **shape, T0=LOOP_TILE)]
    else:
        found = [build(f"dq of {kind}, {what}", query_kernel, dtype, launch, without, **shape)]
    text = text_launch(torch.float16, width)
    tiles = {"T0": text.tile, "T1": rest_tile(77, text.tile)}
    missing = {"dk and dv": {"p_dbias"}}
    if "p_dout" in absent:
        missing = {"dk": {"p_dbias", "p_dv"}}
    elif not text.together:
        missing = {"dk": {"p_dbias", "p_dv"}, "dv": {"p_dbias", "p_dk", "p_delta"}}
    return found + [
        build(f"{output} of {kind}, {what}", text_kernel, dtype, text, absent | lacking, **shape, **tiles)
        for output, lacking in missing.items()
    ]
