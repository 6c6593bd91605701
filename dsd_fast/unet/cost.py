"""What a plan costs: FLOPs by step, and memory by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsd_fast.unet.flops import linear_flops
from dsd_fast.unet.step import Size, Step, Want

if TYPE_CHECKING:
    from dsd_fast.unet.plan import Plan


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
    unet, ran = plan.program.unet, {step.name for step in plan.steps}
    blocks = [block for name, block in plan.program.time_blocks if name in ran]
    if not blocks:
        return 0
    made, read = unet.time_embedding, latents
    total = linear_flops(made.linear_1, latents) + linear_flops(made.linear_2, latents)
    if plan.program.reads_pooled_text:
        added, read = unet.add_embedding, rows
        total += linear_flops(added.linear_1, rows) + linear_flops(added.linear_2, rows)
    return total + sum(linear_flops(block.time_emb_proj, read) for block in blocks)


def row_bytes(plan: Plan, sizes: Sequence[Size], tokens: int, map_tokens: int) -> int:
    """Bytes that one row needs at the plan's peak: what is alive at a step, skip connections and outputs so far."""
    config = plan.program.unet.config
    areas = [h * w for h, w in sizes]
    # The row's latents and time embedding live as long as the run.
    held = config.in_channels * areas[0] + 4 * 4 * config.block_out_channels[0]
    kept = pushed = peak = 0
    stack: list[int] = []
    for step, want in zip(plan.steps, plan.wants, strict=True):
        if step.pops:
            held -= stack.pop()
        peak = max(peak, held + kept + step.elements(sizes[step.level], tokens))
        if step.pushes:
            if pushed in plan.kept_skips:
                stack.append(step.pushes * areas[step.level])
                held += stack[-1]
            pushed += 1
        if want.feature and step.shape is not None:
            kept += math.prod(step.shape(sizes[step.level], tokens))
        # Scores and maps are float32, whatever the network is.
        kept += 2 * (step.heads if want.score else 0)
        kept += 2 * map_tokens * areas[step.level] if want.maps else 0
    return int((peak + kept) * plan.program.unet.dtype.itemsize)
