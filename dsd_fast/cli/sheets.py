"""Pictures in lines on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

# Longer side of an image on a sheet, and what is between two.
_SIDE, _GAP, _PAPER = 256, 4, (255, 255, 255)


def small(picture: Image.Image) -> Image.Image:
    """Makes a picture as large as a sheet shows it; small ones by whole numbers, so that pixels stay sharp squares."""
    times = max(1, _SIDE // max(picture.size))
    shown = picture.convert("RGB").resize([times * side for side in picture.size], Image.Resampling.NEAREST)
    shown.thumbnail((_SIDE, _SIDE))
    return shown


def sheet(lines: Sequence[Sequence[Image.Image | None]]) -> Image.Image:
    """Puts pictures in lines of one length; None leaves its place empty."""
    sizes = [picture.size for line in lines for picture in line if picture is not None] or [(_SIDE, _SIDE)]
    width, height = (max(sides) + _GAP for sides in zip(*sizes, strict=True))
    whole = Image.new("RGB", (width * len(lines[0]) - _GAP, height * len(lines) - _GAP), _PAPER)
    for row, line in enumerate(lines):
        for column, picture in enumerate(line):
            if picture is not None:
                whole.paste(picture, (column * width, row * height))
    return whole
