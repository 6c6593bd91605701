"""What a plan costs: FLOPs by step, and memory by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.common.attention import CHUNK_COPIES, chunk_elements
from dsd_fast.unet.flops import linear_flops
from dsd_fast.unet.step import Size, Step, Want

if TYPE_CHECKING:
    from dsd_fast.unet.plan import Plan


# Those that hold logits where they run in plain torch.
OPERATORS = ("cross_attention_score", "token_maps")


def flops_by_step(
    plan: Plan, latents: int, texts: int, rows: int, sizes: Sequence[Size], tokens: int
) -> dict[str, int]:
    """FLOPs of the texts' keys and values (``text``), of the time embedding (``time``) and of each step by name."""
    table = {"text": _text_flops(plan, texts, tokens), "time": _time_flops(plan, latents, rows)}
    for index, (step, want) in enumerate(zip(plan.steps, plan.wants, strict=True)):
        count = latents if index < plan.boundary else rows
        table[step.name] = count * _step_flops(plan, step, want, sizes[step.level], tokens)
    return table


def _step_flops(plan: Plan, step: Step, want: Want, size: Size, tokens: int) -> int:
    if want.maps and step.map_flops is not None:
        # The attention itself is left out where nothing reads its output.
        return step.map_flops(size, tokens) + (0 if want.last else step.flops(size, tokens))
    if not step.score:
        return step.flops(size, tokens)
    # q kᵀ once more for the maps; of the attention itself, q kᵀ alone where nothing reads its output.
    width: int = plan.program.attention(step.name).inner_dim
    product = 2 * size[0] * size[1] * tokens * width
    attention = (product if want.score else 0) if want.last else step.flops(size, tokens)
    return attention + (product if want.maps else 0)


def _text_flops(plan: Plan, texts: int, tokens: int) -> int:
    total = 0
    for name in plan.key_layers:
        total += linear_flops(plan.program.attention(name).to_k, texts * tokens)
    for name in plan.value_layers:
        total += linear_flops(plan.program.attention(name).to_v, texts * tokens)
    return total


def _time_flops(plan: Plan, latents: int, rows: int) -> int:
    if not plan.reads_time:
        return 0
    unet, ran = plan.program.unet, {step.name for step in plan.steps}
    blocks = [block for name, block in plan.program.time_blocks if name in ran]
    made, read = unet.time_embedding, latents
    total = linear_flops(made.linear_1, latents) + linear_flops(made.linear_2, latents)
    if plan.program.reads_pooled_text:
        added, read = unet.add_embedding, rows
        total += linear_flops(added.linear_1, rows) + linear_flops(added.linear_2, rows)
    return total + sum(linear_flops(block.time_emb_proj, read) for block in blocks)


def run_bytes(plan: Plan, rows: int, sizes: Sequence[Size], tokens: int, map_tokens: int = 0, extra: int = 0) -> int:
    """Bytes alive at the peak of a run of ``rows`` rows; ``extra`` bytes come with each row."""
    most = _chunk_bytes(plan)
    return max(
        rows * (alive + extra) + min(most, rows * chunk) for alive, chunk in _alive(plan, sizes, tokens, map_tokens)
    )


def rows_within(plan: Plan, budget: int, sizes: Sequence[Size], tokens: int, map_tokens: int, extra: int) -> int:
    """The most rows that :func:`run_bytes` of them fit ``budget`` bytes, 0 if none do."""
    most = _chunk_bytes(plan)
    return max(
        0,
        min(
            max(budget // (alive + extra + chunk), (budget - most) // (alive + extra))
            for alive, chunk in _alive(plan, sizes, tokens, map_tokens)
        ),
    )


def _chunk_bytes(plan: Plan) -> int:
    """Bytes of the most logits that an attention operator holds at once: plain torch works them through in chunks."""
    available = backend.available(plan.program.device.type, plan.program.dtype)
    if all(backend.choice(name, available) != "reference" for name in OPERATORS):
        return 0
    real = 8 if plan.program.dtype == torch.float64 else 4
    return CHUNK_COPIES * real * chunk_elements(plan.program.device)


def _alive(plan: Plan, sizes: Sequence[Size], tokens: int, map_tokens: int) -> set[tuple[int, int]]:
    """At each step, the bytes of one row that are alive (outputs and skip connections so far included), and the bytes
    of its logits if the step has them all at once."""
    config, itemsize = plan.program.unet.config, plan.program.dtype.itemsize
    real = max(4, itemsize)
    areas = [h * w for h, w in sizes]
    # The row's latents and time embedding live as long as the run.
    held = itemsize * (config.in_channels * areas[0] + 4 * 4 * config.block_out_channels[0])
    kept = pushed = 0
    stack: list[int] = []
    result = set()
    for step, want in zip(plan.steps, plan.wants, strict=True):
        area, size = areas[step.level], sizes[step.level]
        if step.pops:
            held -= stack.pop()
        # Whole attention maps are made in float32, whatever the network is.
        alive = step.elements(size, tokens) * (real if step.optional else itemsize)
        logits = step.score or want.maps
        chunk = CHUNK_COPIES * real * step.heads * area * step.keys(size, tokens) if logits else 0
        result.add((held + kept + alive, chunk))
        if step.pushes:
            if pushed in plan.kept_skips:
                stack.append(step.pushes * area * itemsize)
                held += stack[-1]
            pushed += 1
        if want.feature and step.shape is not None:
            kept += math.prod(step.shape(size, tokens)) * itemsize
        kept += real * step.heads if want.score else 0
        kept += real * step.keys(size, map_tokens) * area if want.maps else 0
    result.add((held + 2 * kept, 0))
    return result
