"""Cross-attention with its score; see README.md in this folder for the derivation."""

from dsd_fast.kernels.cross_attention_score.op import cross_attention_score

__all__ = ["cross_attention_score"]
