"""The UNet of a loaded :class:`~dsd_fast.compat.DSDPipeline`."""

from __future__ import annotations

import os
from collections.abc import Mapping

import diffusers
from torch import Tensor

from dsd_fast.compat.attn_procs import ADAPTER, load_attn_procs, save_attn_procs


class UNet2DConditionModel(diffusers.UNet2DConditionModel):  # type: ignore[misc]
    """diffusers' network; `load_attn_procs` and `save_attn_procs` are of the official LoRA checkpoints.

    diffusers itself no longer reads those, and writes others.
    """

    def load_attn_procs(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        *,
        weight_name: str | None = None,
    ) -> None:
        """See :func:`dsd_fast.compat.attn_procs.load_attn_procs`."""
        load_attn_procs(self, pretrained_model_name_or_path_or_dict, weight_name=weight_name)

    def save_attn_procs(
        self, save_directory: str | os.PathLike[str], *, name: str = ADAPTER, weight_name: str | None = None
    ) -> None:
        """See :func:`dsd_fast.compat.attn_procs.save_attn_procs`."""
        save_attn_procs(self, save_directory, name=name, weight_name=weight_name)
