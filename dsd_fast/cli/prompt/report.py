"""report.html of `dsd-fast prompt`: images beside their variations, what was done, and how to use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsd_fast.cli.job_report import files, timeline
from dsd_fast.cli.prompt.pictures import Sheet
from dsd_fast.cli.report import code, errors, image, page, paragraph, section, settings, visible
from dsd_fast.cli.terminal import counted
from dsd_fast.jobs import Timeline

# Images with pictures on the page; the folder has all.
_SHOWN = 100

_LIMITS = (
    "One vector stands for the whole image: what is in it and how it looks is kept best, its layout and its counts are "
    "mostly lost."
)


def figures(sheets: Iterable[Sheet]) -> list[str]:
    """Puts the first sheets inside the page; as text they take a fraction of the memory that they take as pixels."""
    shown = list[str]()
    for sheet in sheets:
        # All are asked for, which writes them.
        if len(shown) < _SHOWN:
            text = paragraph(sheet.text) if sheet.text else ""
            alt = f"{sheet.name}, and variations of it"
            shown.append(
                f"<article>\n<h3><bdi>{visible(sheet.name)}</bdi></h3>\n{image(sheet.picture, alt)}{text}</article>\n"
            )
    return shown


def render(summary: Mapping[str, Any], shown: Sequence[str], line: Timeline, loading: str) -> bytes:
    """Makes the page of a conversion.

    Args:
        summary: of the run: "folder" (counts over all runs), "settings", "versions", "errors", "files".
        shown: images with variations, made by :func:`figures`.
        line: what was done when.
        loading: Python that uses the prompts.
    """
    folder, chosen = summary["folder"], summary["settings"]
    lead = [f"{counted(folder['ok'], 'image')} as prompts for {chosen['model']}.", _LIMITS]
    if folder["errors"]:
        lead.append(f"{counted(folder['errors'], 'image')} could not be used; the reasons are below.")
    parts = []
    if shown:
        parts.append(pictures("At the left the image, beside it what the model makes of its prompt.", shown))
    if folder["errors"]:
        rows = [(error["path"] or error["name"], error["reason"], error["message"]) for error in summary["errors"]]
        parts.append(errors("No prompt", "Images that could not be used", rows, folder["errors"], "the index"))
    if line.spans:
        parts.append(timeline(line, {"write": "writing"}, "images were converted"))
    parts += [files(summary["files"]), section("Using the prompts", code(loading))]
    parts.append(settings({**chosen, **summary["versions"]}))
    return page("Images as prompts", lead, parts)


def pictures(what: str, shown: Sequence[str]) -> str:
    """Makes the section of images with variations."""
    return section("Images and their variations", paragraph(what), *shown)
