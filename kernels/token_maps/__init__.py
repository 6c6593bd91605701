"""Attention maps of chosen tokens without the (B, H, L, T) tensor they come from; see README.md in this folder."""

from dsd_fast.kernels.token_maps.op import token_maps

__all__ = ["token_maps"]
