"""Words and phrases of a caption, and the text tokens that stand for them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

Span = tuple[int, int]
"""Start and end of a run of characters in a caption, the end exclusive."""

# Between two characters of words these join them: it's, red-brown, 3.5, snake_case.
_JOINERS = frozenset("'’-‐‑_.")


def words(caption: str) -> list[Span]:
    """The words of a caption, in order: runs of characters other than white space, punctuation and control characters.

    Apostrophes, hyphens, full stops and underscores between two such characters belong to the word. Scripts written
    without spaces give one word per run.
    """
    found: list[Span] = []
    start: int | None = None
    for i in range(len(caption) + 1):
        inside = _in_word(caption, i) or (
            start is not None
            and caption[i : i + 1] in _JOINERS
            and _in_word(caption, i - 1)
            and _in_word(caption, i + 1)
        )
        if inside and start is None:
            start = i
        elif not inside and start is not None:
            found.append(_trimmed(caption, start, i))
            start = None
    # Marks and formatting characters alone are nothing to read.
    return [(a, b) for a, b in found if any(unicodedata.category(c)[0] in "LNS" for c in caption[a:b])]


def find_spans(caption: str, wanted: Sequence[str | Span]) -> list[Span]:
    """The places of phrases and ranges of characters, in the order wanted.

    Args:
        caption: to look in.
        wanted: phrases, whatever their case and the white space between their words, each found wherever it stands as
            whole words; or (start, end).

    Raises:
        ValueError: nothing wanted, a phrase that the caption does not have, or a range outside of it.
    """
    if isinstance(wanted, str) or not len(wanted):
        raise ValueError(f"spans: got {wanted!r}, expected at least one phrase or (start, end) in a sequence")
    found: list[Span] = []
    for item in wanted:
        if not isinstance(item, str):
            found.append(_range(caption, item))
            continue
        parts = [re.escape(part) for part in item.split()]
        matches = [m.span() for m in re.finditer(r"\s+".join(parts), caption, re.IGNORECASE)] if parts else []
        whole = [span for span in matches if not _cuts(caption, span[0]) and not _cuts(caption, span[1])]
        if not whole:
            raise ValueError(
                f"spans: {item!r} is not in the caption {caption!r} as whole words; (start, end) takes any characters"
            )
        found += whole
    return found


def positions(span: Span, offsets: Sequence[Span | None]) -> list[int]:
    """Positions of the tokens that have a character in the span, of ``offsets`` (the characters of each token)."""
    start, end = span
    return [i for i, own in enumerate(offsets) if own is not None and own[0] < end and start < own[1]]


def _trimmed(caption: str, start: int, end: int) -> Span:
    """Without formatting characters, such as those for the direction of writing, at either end."""
    while start < end and unicodedata.category(caption[start]) == "Cf":
        start += 1
    while start < end and unicodedata.category(caption[end - 1]) == "Cf":
        end -= 1
    return start, end


def _range(caption: str, item: Span) -> Span:
    if len(item) != 2 or not all(isinstance(i, int) for i in item) or not 0 <= item[0] < item[1] <= len(caption):
        raise ValueError(f"spans: got {item!r}, expected (start, end) with 0 <= start < end <= {len(caption)}")
    return item[0], item[1]


def _cuts(caption: str, place: int) -> bool:
    """Whether a cut before the character at `place` would part two characters of one word."""
    return _in_word(caption, place - 1) and _in_word(caption, place)


def _in_word(caption: str, i: int) -> bool:
    if not 0 <= i < len(caption):
        return False
    category = unicodedata.category(caption[i])
    return category[0] not in "PZ" and category != "Cc"
