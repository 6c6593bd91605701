"""A page that stands by itself: images inside, no script, nothing loaded, every text escaped."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from PIL import Image

from dsd_fast import __version__
from dsd_fast.cli.heatmaps import WordMaps, scale
from dsd_fast.cli.terminal import counted

# Joiners that emoji and some scripts cannot do without; all other invisible characters are shown as escapes.
_KEPT = frozenset("\u200c\u200d")

# Errors on a page; the files have all.
_ERRORS = 50


@dataclass(frozen=True)
class Card:
    """An image with its ranked captions.

    Attributes:
        name: of the image.
        picture: to show; None for a file that could not be read again.
        ranked: best first: "caption", "score", and perhaps "note" (a few words) and "right" (it is the true one).
        lowest, highest: of all scores of the image.
        maps: heat maps of some of the captions.
    """

    name: str
    picture: Image.Image | None
    ranked: Sequence[Mapping[str, Any]]
    lowest: float
    highest: float
    maps: Sequence[WordMaps] = field(default=())


def page(title: str, lead: Sequence[str], sections: Sequence[str]) -> bytes:
    """Makes the whole document in UTF-8.

    Args:
        title: plain text.
        lead: paragraphs of plain text below it.
        sections: HTML, made by this module's functions.
    """
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    paragraphs = "".join(f"<p>{visible(text)}</p>\n" for text in lead)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{visible(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{visible(title)}</h1>
{paragraphs}</header>
<main>
{"".join(sections)}</main>
<footer>dsd-fast {visible(__version__)}</footer>
</body>
</html>
""".encode()


def section(title: str, *parts: str) -> str:
    """Puts parts, which are HTML, under a title, which is plain text."""
    return f"<section>\n<h2>{visible(title)}</h2>\n{''.join(parts)}</section>\n"


def paragraph(text: str) -> str:
    """Makes a paragraph of plain text."""
    return f"<p>{visible(text)}</p>\n"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """Makes a table of HTML cells under a plain header and caption; the last `numbers` columns are set to the right.

    It scrolls by itself where it is wider than the screen.
    """
    first = len(header) - numbers
    sides = ["" if i < first else ' class="number"' for i in range(len(header))]
    head = "".join(f'<th scope="col"{side}>{visible(text)}</th>' for side, text in zip(sides, header, strict=True))
    body = ""
    for row in rows:
        cells = [f"<td{side}>{cell}</td>" for side, cell in zip(sides, row, strict=True)]
        cells[0] = f'<th scope="row">{row[0]}</th>'
        body += f"<tr>{''.join(cells)}</tr>\n"
    return (
        f'<div class="scroll" role="region" aria-label="{visible(caption)}" tabindex="0"><table>\n'
        f"<caption>{visible(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n"
        "</table></div>\n"
    )


def errors(
    title: str, caption: str, rows: Sequence[Sequence[str]], total: int = 0, where: str = "", first: str = "file"
) -> str:
    """Makes the section of inputs that could not be used.

    Args:
        title, caption: of the section and its table.
        rows: the input, reason and what it means, as plain text; the first are shown.
        total: how many errors there are.
        where: that all of them stand.
        first: what an input is.
    """
    shown = [[visible(text) for text in row] for row in rows[:_ERRORS]]
    left = total - len(shown)
    more = paragraph(f"{counted(left, 'more error')} in {where}.") if left > 0 else ""
    return section(title, table(caption, [first, "reason", "what"], shown), more)


def share(value: float, interval: tuple[float, float], chance: float) -> str:
    """Draws a bar from 0 to 1: a dot at `value`, its interval, and a line at `chance`."""
    low, high = interval
    return (
        '<svg class="share" viewBox="0 0 100 10" aria-hidden="true">'
        '<rect class="track" x="0" y="4" width="100" height="2"/>'
        f'<rect class="interval" x="{100 * low:.2f}" y="3.5" width="{100 * (high - low):.2f}" height="3"/>'
        f'<rect class="chance" x="{100 * chance - 0.5:.2f}" y="0" width="1" height="10"/>'
        f'<circle class="dot" cx="{100 * value:.2f}" cy="5" r="3"/></svg>'
    )


def image(picture: Image.Image, alt: str) -> str:
    """Puts a picture inside the page, and the words for those who do not see it, as plain text."""
    return f'<img src="{_uri(picture)}" alt="{visible(alt)}" width="{picture.width}" height="{picture.height}">'


def lane(spans: Sequence[tuple[float, float]], total: float) -> str:
    """Draws bars for the spans of time, on a line that stands for the time from 0 to `total`."""
    # What is closer than a pixel is drawn as one.
    drawn: list[list[float]] = []
    for start, end in sorted((1000 * start / total, 1000 * end / total) for start, end in spans if total > 0):
        if drawn and start - drawn[-1][1] < 1:
            drawn[-1][1] = max(drawn[-1][1], end)
        else:
            drawn.append([start, end])
    bars = "".join(
        f'<rect class="dot" x="{start:.1f}" y="0" width="{max(1.0, end - start):.1f}" height="20"/>'
        for start, end in drawn
    )
    return (
        '<svg class="lane" viewBox="0 0 1000 20" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" x="0" y="0" width="1000" height="20"/>{bars}</svg>'
    )


def code(text: str) -> str:
    """Shows lines of code as they are."""
    return f'<pre class="scroll" tabindex="0"><code>{chr(10).join(map(visible, text.split(chr(10))))}</code></pre>\n'


def settings(values: Mapping[str, Any]) -> str:
    """Makes a list of names and values, folded away; names whose value is None are left out."""
    rows = "".join(
        f"<dt>{visible(name)}</dt><dd>{visible(str(value))}</dd>\n"
        for name, value in values.items()
        if value is not None
    )
    return f"<details><summary>Settings and versions</summary>\n<dl>\n{rows}</dl></details>\n"


def cards(items: Sequence[str], total: int) -> str:
    """Joins the cards, made by :func:`card`, and says how many of `total` images they leave out."""
    made = "".join(items)
    if total <= len(items):
        return made
    count, left = len(items), total - len(items)
    shown = "The first image is" if count == 1 else f"The first {count:,} images are"
    return made + paragraph(
        f"{shown} shown of {total:,}; {left:,} more {'is' if left == 1 else 'are'} in results.json and scores.parquet."
    )


def visible(text: str) -> str:
    """Writes plain text as HTML; control, direction and other invisible characters, undecodable bytes too, escaped."""
    shown = (
        c if c.isprintable() or c in _KEPT or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )
    return html.escape("".join(shown))


def card(item: Card) -> str:
    """Makes a card with its pictures inside; as text these take a fraction of the memory that they take as pixels."""
    picture = '<p class="missing">The file could not be read a second time.</p>'
    if item.picture is not None:
        picture = image(item.picture, item.name)
    rows = "".join(_ranked(row, item) for row in item.ranked)
    maps = "".join(_maps(each, item.name) for each in item.maps)
    return (
        f'<article>\n<h3><bdi>{visible(item.name)}</bdi></h3>\n<div class="pair">\n<div class="shown">{picture}</div>\n'
        f"<ol>\n{rows}</ol>\n</div>\n{maps}</article>\n"
    )


def _ranked(row: Mapping[str, Any], item: Card) -> str:
    width = item.highest - item.lowest
    part = 100 * (row["score"] - item.lowest) / width if width > 0 else 100
    note = f' <span class="note">{visible(row["note"])}</span>' if row.get("note") else ""
    kind = ' class="right"' if row.get("right") else ""
    return (
        f'<li{kind}><span class="text"><bdi>{visible(row["caption"])}</bdi>{note}</span>'
        f'<span class="score">{row["score"]:.4f}</span>'
        '<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="4"/><rect class="fill" width="{part:.2f}" height="4"/></svg></li>\n'
    )


def _maps(maps: WordMaps, name: str) -> str:
    caption = maps.caption
    tiles = ""
    for start, end, picture in maps.words:
        word = visible(caption[start:end])
        marked = f"{visible(caption[:start])}<mark>{word}</mark>{visible(caption[end:])}"
        tiles += (
            f"<figure>{image(picture, f'Heat map of “{caption[start:end]}” over {name}')}"
            f"<figcaption><bdi>{marked}</bdi></figcaption></figure>\n"
        )
    if not maps.words and not maps.left_out:
        return paragraph("This caption has no words to map.")
    title = f"<h4>Where the words of “<bdi>{visible(caption)}</bdi>” are looked at</h4>\n"
    left = counted(maps.left_out, "more word" if maps.words else "word")
    more = paragraph(f"The maps of {left} are in the files.") if maps.left_out else ""
    if not maps.words:
        return title + more
    return (
        f'{title}<div class="maps">\n{tiles}</div>\n{more}'
        f'<p class="scale"><span>0</span><img src="{_scale()}" alt="dark to light" width="256" height="12">'
        f"<span>{maps.top:.2g}</span> <span>attention probability, one scale for all words of this caption</span></p>\n"
    )


def _uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


@cache
def _scale() -> str:
    return _uri(scale())


@cache
def _style() -> str:
    return resources.files("dsd_fast.cli").joinpath("report.css").read_text(encoding="utf-8")
