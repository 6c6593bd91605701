"""The contact sheet: each input beside what img2img makes of it, without and with each technique."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN, _LINE, _TEXT = 12, 20, 14
_PAPER, _INK, _PALE = (255, 255, 255), (30, 30, 30), (110, 110, 110)
# Longer side of a picture on the sheet; small ones are enlarged by whole numbers, so that each pixel stays a square.
_LEAST, _MOST = 128, 320


def contact_sheet(
    columns: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[Sequence[str]] = ()
) -> Image.Image:
    """Pictures in columns, a title above each and a caption below each picture.

    The font that comes with Pillow has Latin letters only; other characters become boxes. Lines too wide for a column
    are cut.

    Args:
        columns: (title, pictures) for each column; all pictures of one size.
        captions: one sequence for each column, one text for each picture; none at all if empty.

    Returns:
        RGB image.

    Raises:
        ValueError: no picture, or columns that differ in length.
    """
    counts = {len(pictures) for _, pictures in columns}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"columns: got lengths {sorted(counts)}, expected the same number of pictures in each, not 0")
    if captions and [len(each) for each in captions] != [len(pictures) for _, pictures in columns]:
        raise ValueError("captions: expected one for each picture")
    (rows,) = counts
    font = ImageFont.load_default(_TEXT)
    shown = [[_shown(picture) for picture in pictures] for _, pictures in columns]
    width, height = shown[0][0].size
    step = (width + _MARGIN, height + _MARGIN + (_LINE if captions else 0))
    top = _MARGIN + _LINE
    sheet = Image.new("RGB", (_MARGIN + len(columns) * step[0], top + rows * step[1]), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, ((title, _), pictures) in enumerate(zip(columns, shown, strict=True)):
        x = _MARGIN + number * step[0]
        draw.text((x, _MARGIN - 4), _fitted(title, font, width), _INK, font)
        for row, picture in enumerate(pictures):
            y = top + row * step[1]
            sheet.paste(picture, (x, y))
            if captions:
                draw.text((x, y + height + 2), _fitted(captions[number][row], font, width), _PALE, font)
    return sheet


def _shown(picture: Image.Image) -> Image.Image:
    longer = max(picture.size)
    if longer < _LEAST:
        times = -(-_LEAST // longer)
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    if longer > _MOST:
        size = (max(1, picture.width * _MOST // longer), max(1, picture.height * _MOST // longer))
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    plain = "".join(c if c.isprintable() else " " for c in text)
    while plain and font.getlength(plain) > width:
        plain = plain[:-2] + "…" if len(plain) > 2 else ""
    return plain
