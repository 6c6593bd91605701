"""A value times the gelu of its gate; see README.md in this folder."""

from dsd_fast.kernels.geglu.op import geglu

__all__ = ["geglu"]
