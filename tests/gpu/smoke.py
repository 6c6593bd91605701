"""What the smoke tests launch, as data: a test without a GPU counts what of it has to be compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """A call of ``cross_attention_score``: 16-bit rows of 97 positions with three texts of 77 tokens, four heads.

    Attributes:
        width: D.
        output: whether the output is computed, or the score alone.
        gradients: whether there is a backward pass.
        dtype: of queries, keys and values.
    """

    width: int
    output: bool = True
    gradients: bool = True
    dtype: torch.dtype = torch.bfloat16

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Queries (6, 97, H·D), keys and values (3, 77, H·D), and (6,) the text of each row."""
        g = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(n, t, 4 * self.width, generator=g).to(device, self.dtype)
            for n, t in ((6, 97), (3, 77), (3, 77))
        )
        return q, k, v if self.output else None, torch.tensor([2, 0, 0, 2, 1, 2], device=device)

    def launch(self, device: str) -> None:
        """Launch the kernels of the call, and of its backward pass, whatever the device."""
        from dsd_fast.kernels.cross_attention_score import kernel

        q, k, v, index = self.tensors(device)
        # Neither lengths, biases nor masks; the mean over positions.
        options = (None, None, None), (4, self.width**-0.5, True)
        out, score, saved = kernel.forward(q, k, v, index, *options[0], *options[1], self.gradients)
        if self.gradients:
            kernel.backward(out, score, q, k, v, index, *options[0], saved, *options[1], query=True, text=True)


# The widths of SD 1.5's, 2.1's and SDXL's layers; the last tap of a score has no output.
ATTENTION = (
    *(Attention(width) for width in (40, 64, 80, 160)),
    Attention(40, output=False, gradients=False),
    Attention(64, output=False, gradients=False),
    Attention(40, gradients=False, dtype=torch.float16),
)
