"""Images as prompts: the vectors that stand for them, and how states for cross-attention are made of those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.prompts import PromptStates


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """N images as prompts (SD-IPC, Ding et al., arXiv 2305.12716).

    State j of a prompt is its text's where j is before the text's end, and from there on its vector plus ``alpha``
    times the text's. Of an empty text there is the begin state alone.

    Attributes:
        vectors: (N, E), h of each image.
        texts: (M, t, E), states of the different texts; t are ``tokens`` where ``alpha`` is not 0, else as many as the
            largest of ``ends``.
        ends: (M,) int64 on the CPU, from 1: position of the text's end token, the first that the vector takes.
        text_of: (N,) int64 on the CPU, the number of each prompt's text.
        pooled: (N, E2), SDXL's pooled states; None for other families.
        alpha: how much of the text's own states from its end on is added.
        tokens: states of a prompt, 77 with CLIP's tokenizer.
        names: of the images.
        settings: how they were made, as JSON.
    """

    vectors: Tensor
    texts: Tensor
    ends: Tensor
    text_of: Tensor
    pooled: Tensor | None = None
    alpha: float = 0.0
    tokens: int = 77
    names: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: int | slice | Tensor) -> ImagePrompt:
        """Some of them, one for an integer; of texts those that they have."""
        if isinstance(rows, int):
            rows = torch.arange(len(self), device="cpu")[rows][None]
        numbers = torch.arange(len(self), device="cpu")[rows]
        used, text_of = torch.unique(self.text_of[numbers], return_inverse=True)
        own = upload(numbers, self.vectors.device)
        return replace(
            self,
            vectors=self.vectors[own],
            texts=self.texts[upload(used, self.texts.device)],
            ends=self.ends[used],
            text_of=text_of,
            pooled=None if self.pooled is None else self.pooled[own],
            names=tuple(self.names[number] for number in numbers.tolist()) if self.names else (),
        )

    def __iter__(self) -> Iterator[ImagePrompt]:
        return (self[number] for number in range(len(self)))

    def states(self) -> PromptStates:
        """Their states; with ``alpha`` 0 in short, one state for all that are the vector."""
        count, ends = len(self), self.ends[self.text_of]
        width = self.tokens if self.alpha else int(ends.max()) + 1 if count else 1
        place = torch.arange(width, device="cpu")
        device = self.vectors.device
        texts = self.texts[upload(self.text_of, self.texts.device)]
        # (N, t, E) → (N, T, E)
        if texts.shape[1] < width:
            texts = torch.cat([texts, texts.new_zeros(count, width - texts.shape[1], texts.shape[2])], dim=1)
        texts = texts[:, :width].to(self.vectors)
        before = upload(place < ends[:, None], device)[..., None]
        from_end = self.vectors[:, None] + self.alpha * texts if self.alpha else self.vectors[:, None]
        states = torch.where(before, texts, from_end)
        counts = None
        if not self.alpha:
            counts = (place <= ends[:, None]).to(torch.int64)
            counts = torch.where(place == ends[:, None], self.tokens - ends[:, None], counts)
        lengths = torch.full((count,), width, dtype=torch.int64, device="cpu") if counts is None else ends + 1
        return PromptStates(
            states, self.pooled, lengths, torch.zeros(count, width, dtype=torch.int64, device="cpu"), counts
        )

    @property
    def embeds(self) -> Tensor:
        """All states, (N, ``tokens``, E), as ``prompt_embeds`` of any diffusers pipeline."""
        return self.states().expanded().states
