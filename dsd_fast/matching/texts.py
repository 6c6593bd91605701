"""Encoded prompts to the keys and values that a plan's cross-attentions read."""

from __future__ import annotations

import torch
from torch import Tensor

from dsd_fast.models import PromptStates
from dsd_fast.unet import TextKV
from dsd_fast.unet.plan import Plan


def project(
    plan: Plan, states: PromptStates, *, tokens: str = "all", prompt: Tensor | None = None, bare: int = 0
) -> TextKV:
    """M texts for a plan's layers; differentiable.

    Args:
        plan: whose layers project the texts.
        states: of the M texts, on any device.
        tokens: "real" counts begin, words, end and learned vectors in scores; "all" counts padding too.
        prompt: (n, E) learned vectors that follow the tokens of each text, or None.
        bare: how many texts, the last ones, go without the learned vectors.
    """
    device, dtype = plan.program.device, plan.program.dtype
    values = states.states.to(device, dtype)
    count, length, _ = values.shape
    real = torch.arange(length) < states.lengths[:, None]
    lengths = None
    if prompt is not None:
        added = len(prompt)
        values = torch.cat([values, prompt.to(device, dtype).expand(count, -1, -1)], dim=1)
        real = torch.cat([real, real.new_ones(count, added)], dim=1)
        if bare:
            lengths = torch.tensor([length + added] * (count - bare) + [length] * bare)
    pooled = None if states.pooled is None else states.pooled.to(device, dtype)
    return plan.encode_text(values, pooled=pooled, score_mask=real if tokens == "real" else None, lengths=lengths)
