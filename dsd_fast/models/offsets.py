"""Which characters of a text each of its tokens stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsd_fast.models.prompts import as_tokens, tokenize

Span = tuple[int, int]


def token_offsets(tokenizers: Sequence[Any], text: str, limit: int) -> list[Span | None]:
    """The characters of each position of a prompt, as :meth:`Model.encode_prompts` lays it out.

    A learned token of several vectors takes as many positions, each with the characters of the token as written.

    Args:
        tokenizers: of the model; with two (SDXL), position t of the text states holds token t of both.
        text: one prompt.
        limit: positions of a prompt, from :func:`~dsd_fast.models.prompts.token_limit`.

    Returns:
        `limit` entries: (start, end) in `text`, end exclusive; None for begin, end and padding tokens.

    Raises:
        ValueError: the text is longer than the limit; a tokenizer tells no offsets, or tokenizers split the text
            differently, or a vector of a learned token is named by hand, so that positions have no characters.
    """
    found: list[list[Span | None]] = []
    for tokenizer in tokenizers:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"tokenizer: {type(tokenizer).__name__} does not tell which characters a token stands for")
        used, mask = tokenize(tokenizer, [text], limit)
        ids, offsets = _spelled_out(tokenizer, text)
        if ids != used[0][: int(mask[0].sum())].tolist():
            raise ValueError(f"text: {text!r} is encoded as tokens whose characters are unknown")
        found.append([*offsets, *[None] * (limit - len(offsets))])
    if any(other != found[0] for other in found):
        raise ValueError(f"text: the model's tokenizers split {text!r} differently")
    return found[0]


def _spelled_out(tokenizer: Any, text: str) -> tuple[list[int], list[Span | None]]:
    """Ids and offsets of the text as written, learned tokens of several vectors repeated vector by vector."""
    encoded = as_tokens(tokenizer, text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids: list[int] = []
    offsets: list[Span | None] = []
    parts = zip(encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    added: dict[str, int] = tokenizer.added_tokens_encoder
    names = {number: name for name, number in added.items()}
    for number, (start, end), special in parts:
        ids.append(number)
        offsets.append(None if special else (start, end))
        vector = 1
        while number in names and f"{names[number]}_{vector}" in added:
            ids.append(added[f"{names[number]}_{vector}"])
            offsets.append((start, end))
            vector += 1
    return ids, offsets
