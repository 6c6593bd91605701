"""One picture of an image and the heat maps of its caption's words, with the caption under each."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dsd_fast.images.overlay import Floats, colours, enlarged, overlay

_COLUMNS = 4
_MARGIN, _LINE, _TEXT = 16, 22, 15
_PAPER, _INK, _PALE, _MARK = (255, 255, 255), (30, 30, 30), (110, 110, 110), (255, 224, 130)
_BAR = (256, 14)

Span = tuple[int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def panel(image: Image.Image, caption: str, maps: Sequence[tuple[Span, Floats]], top: float) -> Image.Image:
    """The image, then each heat map over it, the caption below with the map's characters marked, and the scale.

    The font that comes with Pillow has Latin letters only; other characters become boxes, control characters "�".

    Args:
        image: of any size and mode; shown as :func:`~dsd_fast.images.overlay.enlarged` has it.
        caption: that the maps belong to.
        maps: [((start, end), (h, w) values), …], (start, end) in `caption`.
        top: the value with the last colour, the same for all maps.

    Returns:
        RGB image, four pictures in a row.

    Raises:
        ValueError: as :func:`~dsd_fast.images.overlay.overlay`.
    """
    font = ImageFont.load_default(_TEXT)
    shown = enlarged(image)
    tiles = [(shown, None), *((overlay(image, values, top), span) for span, values in maps)]
    cell = max(shown.width, _BAR[0] // 2)
    lines = _wrapped(caption, font, cell)
    columns, rows = min(len(tiles), _COLUMNS), -(-len(tiles) // _COLUMNS)
    step = (cell + _MARGIN, shown.height + _LINE * len(lines) + 2 * _MARGIN)
    width = max(columns * step[0], 2 * _BAR[0]) + _MARGIN
    sheet = Image.new("RGB", (width, rows * step[1] + _BAR[1] + _LINE + 2 * _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (tile, span) in enumerate(tiles):
        x = _MARGIN + number % columns * step[0]
        y = _MARGIN + number // columns * step[1]
        sheet.paste(tile, (x, y))
        for line, (start, end) in enumerate(lines):
            at = (x, y + shown.height + 6 + line * _LINE)
            _write(
                draw, font, at, _plain(caption[start:end]), None if span is None else (span[0] - start, span[1] - start)
            )
    _scale(sheet, draw, font, rows * step[1] + _MARGIN, top)
    return sheet


def _scale(sheet: Image.Image, draw: ImageDraw.ImageDraw, font: Font, y: int, top: float) -> None:
    bar = np.broadcast_to(colours(np.linspace(0, 1, _BAR[0])), (_BAR[1], _BAR[0], 3))
    sheet.paste(Image.fromarray(np.ascontiguousarray(bar)), (_MARGIN, y))
    draw.text((_MARGIN, y + _BAR[1] + 2), "0", _PALE, font)
    right = f"{top:.2g}"
    draw.text((_MARGIN + _BAR[0] - font.getlength(right), y + _BAR[1] + 2), right, _PALE, font)
    draw.text((2 * _MARGIN + _BAR[0], y - 3), "attention probability, all maps alike", _PALE, font)


def _wrapped(caption: str, font: Font, width: int) -> list[Span]:
    """The caption's lines as (start, end); a word that is too long for a line is cut."""
    lines: list[Span] = []
    start: int | None = None
    end = 0
    for word in re.finditer(r"\S+", caption):
        if start is not None and font.getlength(_plain(caption[start : word.end()])) <= width:
            end = word.end()
            continue
        if start is not None:
            lines.append((start, end))
        start, end = word.start(), word.end()
        while font.getlength(_plain(caption[start:end])) > width and end - start > 1:
            cut = max(
                i
                for i in range(1, end - start)
                if i == 1 or font.getlength(_plain(caption[start : start + i])) <= width
            )
            lines.append((start, start + cut))
            start += cut
    return lines if start is None else [*lines, (start, end)]


def _write(draw: ImageDraw.ImageDraw, font: Font, at: tuple[int, int], line: str, marked: Span | None) -> None:
    """A line of text; the characters of `marked`, which may lie outside of it, on a coloured ground."""
    if marked is not None:
        first, last = (min(max(i, 0), len(line)) for i in marked)
        if first < last:
            left, right = (at[0] + font.getlength(line[:i]) for i in (first, last))
            draw.rounded_rectangle((left - 2, at[1] - 1, right + 2, at[1] + _LINE - 4), 3, _MARK)
    draw.text(at, line, _INK, font)


def _plain(text: str) -> str:
    """As many characters, none of which moves the pen elsewhere."""
    return "".join(" " if c.isspace() else c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
