"""report.html of `dsd-fast tokens learn`: what became of each class, and pictures without and with its token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsd_fast.cli.report import code, image, page, paragraph, section, settings, table, visible
from dsd_fast.cli.terminal import counted
from dsd_fast.cli.tokens.pictures import Sheet
from dsd_fast.cli.tokens.show import COLUMNS, at_clamp, figures

SHOWN = 100
"""Classes with pictures on the page; the folder has all."""

_HOW = {
    "accuracy": "enough of its images were right",
    "patience": "its loss went down no more",
    "gamma": "the class was probable enough",
    "updates": "it had all its updates",
    "not-finite": "its loss was no number",
}

_FIGURES = (
    "Loss, share of right images and mean probability of the class are of the update whose vectors were kept, by the "
    "classifier that taught them: another one may see it otherwise. Norms are in mean norms of the vocabulary."
)


def render(summary: Mapping[str, Any], sheets: Sequence[str], loading: str) -> bytes:
    """Makes the page.

    Args:
        summary: of the run: "tokens", "settings" and "versions".
        sheets: of the first classes, made by :func:`figure`.
        loading: Python that makes images with the tokens.
    """
    tokens = summary["tokens"]
    lead = [f"{counted(len(tokens), 'class token')} of {summary['settings']['model']}{at_clamp(tokens)}."]
    rows = [[visible(each["token"]), visible(each["class"]), *map(visible, figures(each))] for each in tokens]
    reasons = {each["ended"] for each in tokens}
    why = "; ".join(f"{name}: {text}" for name, text in _HOW.items() if name in reasons)
    parts = [
        section(
            "Classes",
            paragraph(f"Why a class ended: {why}."),
            paragraph(_FIGURES),
            table("Each class", ["token", "class", *COLUMNS], rows, numbers=4),
        )
    ]
    if sheets:
        left = len(tokens) - len(sheets)
        more = paragraph(f"Those of {counted(left, 'more token')} are in the folder.") if left else ""
        what = "Above the plain text, below the same with the token; images of a column begin at the same noise."
        parts.append(section("Without and with the token", paragraph(what), *sheets, more))
    parts.append(section("Using the tokens, beside the folder", code(loading)))
    parts.append(settings({**summary["settings"], **summary["versions"]}))
    return page("Class tokens", lead, parts)


def figure(sheet: Sheet) -> str:
    """Puts a class's pictures inside the page; as text they take a fraction of the memory that they take as pixels."""
    texts = f"<bdi>{visible(sheet.plain)}</bdi>; below <bdi>{visible(sheet.learned)}</bdi>"
    shown = image(sheet.picture, f"{sheet.plain}; below {sheet.learned}")
    return f"<article>\n<h3><bdi>{visible(sheet.token)}</bdi></h3>\n{shown}<p>{texts}</p>\n</article>\n"


def loading(out: Path, model: str, texts: Sequence[str]) -> str:
    """Tells the Python that makes an image of each text with the tokens of the folder."""
    return f"""import dsd_fast as dsd

model = dsd.load({model!r})
for image in dsd.generate(model, {[*texts]!r}, tokens={str(out)!r}):
    image.show()"""
