"""Group norm, the time embedding before it and the SiLU after it; see README.md in this folder."""

from dsd_fast.kernels.group_norm_silu.op import group_norm_silu

__all__ = ["group_norm_silu"]
