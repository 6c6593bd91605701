"""What a folder of learned tokens says of each, and which words of the vocabulary its vectors are near to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from dsd_fast.cli.terminal import CommandError
from dsd_fast.engine import LearnedTokens
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models import Model

COLUMNS = ("updates", "ended", "loss", "right", "prob.", "norm")
"""Of :func:`figures`: how many updates and why there were no more; of the images of the update that is kept the loss,
the share that was right and the class's mean probability; the vectors' norm, in mean norms of the vocabulary."""


def figures(about: Mapping[str, Any]) -> list[str]:
    """Tells :data:`COLUMNS` of a token as text; "-" where there is none."""
    loss, right, probability, norm = (
        "-" if (value := about.get(name)) is None else shown.format(value)
        for name, shown in (("loss", "{:.4f}"), ("accuracy", "{:.0%}"), ("probability", "{:.2f}"), ("norm", "{:.2f}"))
    )
    clamped = " (clamped)" if about.get("clamped") else ""
    return [str(about.get("updates", "-")), about.get("ended") or "-", loss, right, probability, f"{norm}{clamped}"]


def at_clamp(tokens: Collection[Mapping[str, Any]]) -> str:
    """Tells how many tokens have vectors that the norm clamp holds; nothing where none has."""
    held = sum(bool(about.get("clamped")) for about in tokens)
    return f", {held:,} of {len(tokens):,} at the norm clamp" if held else ""


def nearest_words(model: Model, tokens: LearnedTokens, count: int) -> dict[str, str]:
    """Finds the words of the vocabulary to which each vector of a token has the largest cosines, best first.

    Of the vocabulary those of plain letters that end a word count; of SDXL's text encoders the first.

    Raises:
        CommandError: the tokens are of a text encoder of another width.
    """
    tokenizer, table = model.tokenizers[0], model.text_encoders[0].get_input_embeddings().weight.detach()
    ending = ((name.removesuffix("</w>"), number) for name, number in tokenizer.get_vocab().items() if "</w>" in name)
    words = {word: number for word, number in sorted(ending) if word.isascii() and word.isalpha()}
    # (W, E)
    rows = _directions(table[torch.tensor(list(words.values()), dtype=torch.int64, device=table.device)])
    names, found = list(words), {}
    for token, vectors in tokens.items():
        own = vectors["clip_l"] if isinstance(vectors, Mapping) else vectors
        if own.shape[-1] != rows.shape[1]:
            raise CommandError(f"--model: its text encoder is {rows.shape[1]} wide, the tokens {own.shape[-1]}")
        # (v, W)
        cosines = _directions(upload(own, rows.device)) @ rows.T
        best = cosines.topk(min(count, len(names)), dim=1).indices.tolist()
        found[token] = "; ".join(" ".join(names[number] for number in line) for line in best)
    return found


def _directions(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
