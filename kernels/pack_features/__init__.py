"""Feature maps resized, normalised and cast into a buffer in one pass; see README.md in this folder."""

from dsd_fast.kernels.pack_features.op import pack_features

__all__ = ["pack_features"]
