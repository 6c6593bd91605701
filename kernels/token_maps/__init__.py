"""Attention maps of chosen tokens without the (B, H, L, T) tensor they come from."""

from dsd_fast.kernels.token_maps.reference import token_maps

__all__ = ["token_maps"]
