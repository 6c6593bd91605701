"""The UNet of a loaded :class:`~dsd_fast.compat.DSDPipeline`."""

from __future__ import annotations

import diffusers

from dsd_fast.compat.attn_procs import load_attn_procs, save_attn_procs


class UNet2DConditionModel(diffusers.UNet2DConditionModel):  # type: ignore[misc]
    """diffusers' network; `load_attn_procs` and `save_attn_procs` are of the official LoRA checkpoints.

    diffusers itself no longer reads those, and writes others.
    """

    load_attn_procs = load_attn_procs
    save_attn_procs = save_attn_procs
