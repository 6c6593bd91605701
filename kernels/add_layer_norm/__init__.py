"""A sum and its layer norm; see README.md in this folder."""

from dsd_fast.kernels.add_layer_norm.op import add_layer_norm

__all__ = ["add_layer_norm"]
