"""Yes-or-no questions of VQAv2 as statements, each of one image among ten (eric-ai-lab/DSD, data/test.txt).

The text list has lines ``image*The question is asking about yes or no: <question> <statement>``; lines of other
questions are left out, and the text is what follows the first ": ". The first image is the line's own. The official
code draws the nine others without a seed, each line's image as likely, and keeps them in a JSON file. Here they are
drawn likewise, by the seed, the line's image and its text, and all ten are different, where the official ones may hold
an image twice. That JSON file is read too: a list of [image, [nine images], text].
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsd_fast.jobs.tables import is_text, read_json, read_lines
from dsd_fast.matching.datasets.drafts import Draft
from dsd_fast.matching.datasets.negatives import NEGATIVES, Draws

# How a line says what kind of question it has; the official code reads those of this kind alone.
_BINARY = "The question is asking about yes or no"


def vqa_binary_drafts(file: Path, seed: int) -> Iterator[Draft]:
    """One draft a statement: its image, then nine others.

    Raises:
        ValueError: the file cannot be read, or a line is wrong.
    """
    if file.suffix == ".json":
        yield from _saved(file)
        return
    statements: list[tuple[str, str, str]] = []
    for number, line in read_lines(file):
        place = f"{file}, line {number}"
        image, star, rest = line.partition("*")
        if not star or "*" in rest or not image.strip():
            raise ValueError(f"{place}: got {line[:80]!r}, expected '<image>*{_BINARY}: <question> <statement>'")
        text = rest.split(": ", 1)[-1]
        if _BINARY not in rest:
            continue
        if ": " not in rest or not is_text(text):
            raise ValueError(f"{place}: no text follows {_BINARY!r}")
        statements.append((place, image, text))
    if not statements:
        raise ValueError(f"{file} has no line with {_BINARY!r}")
    # Sorted, so that the order of the lines does not change what is drawn.
    images = sorted(image for _, image, _ in statements)
    for place, image, text in statements:
        yield Draft(place, [image, *_others(image, images, Draws(seed, image, text), place)], [text])


def _others(image: str, images: list[str], draws: Draws, place: str) -> list[str]:
    def draw() -> str | None:
        other = draws.choice(images)
        return None if other == image else other

    return draws.different(draw, place, "images")


def _saved(file: Path) -> Iterator[Draft]:
    items: Any = read_json(file)
    expected = f"a list of [image, [{NEGATIVES} images], text]"
    if not isinstance(items, list) or not items:
        raise ValueError(f"{file}: got {repr(items)[:80]}, expected {expected}")
    for number, item in enumerate(items, start=1):
        place = f"{file}, item {number}"
        if not isinstance(item, list) or len(item) != 3 or not isinstance(item[1], list) or len(item[1]) != NEGATIVES:
            raise ValueError(f"{place}: got {repr(item)[:80]}, expected [image, [{NEGATIVES} images], text]")
        image, others, text = item
        if not all(map(is_text, (image, *others, text))):
            raise ValueError(f"{place}: an image or the text is no text: {repr(item)[:80]}")
        yield Draft(place, [image, *others], [text])
