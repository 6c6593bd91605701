"""report.html of `dsd-fast prompt`: images beside their variations, what was done, and how to use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsd_fast.cli.job_report import files, sized, timeline
from dsd_fast.cli.prompt.pictures import Sheet
from dsd_fast.cli.report import code, errors, image, page, paragraph, section, settings, table, visible
from dsd_fast.cli.terminal import counted
from dsd_fast.jobs import Timeline

# Images with pictures on the page; the folder has all.
_SHOWN = 100

_LOSSES = ("loss", "validation_loss")

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
    lead = [f"{counted(folder['ok'], 'image')} as prompts for {chosen['model']}. {_map(chosen)}", _LIMITS]
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


def _map(chosen: Mapping[str, Any]) -> str:
    """Says how vectors are made of what CLIP sees."""
    if quality := chosen.get("quality"):
        found = " and ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in quality.items())
        return f"Their states come by a map that was fitted to captions; of captions held out it finds: {found}."
    kept = "" if chosen["kept"] is None else f", {chosen['kept']:,} singular values kept"
    return f"Vectors of norm {chosen['norm']:.4g}, by the {chosen['inverse']} inverse at {chosen['cut']:.3g}{kept}."


def render_tuned(summary: Mapping[str, Any], shown: Sequence[str], loading: str) -> bytes:
    """Makes the page of a tuning.

    Args:
        summary: of the run, the content of history.json.
        shown: images with variations before and after, made by :func:`figures`.
        loading: Python that uses what was learned.
    """
    lead = [f"{summary['settings']['model']} tuned to {counted(summary['images'], 'image')}.", _LIMITS]
    parts = []
    if shown:
        what = "At the left the image; beside it variations, above before tuning, below after, from the same noise."
        parts.append(pictures(what, shown))
    rows = [
        [f"{each['step']:,}", *("-" if (value := each[name]) is None else f"{value:.4f}" for name in _LOSSES)]
        for each in summary["records"]
    ]
    went = table("How it went", ["after step", "loss", "held out"], rows, numbers=2)
    parts.append(section("Tuning", paragraph(f"{told(summary)}."), went))
    parts.append(section("Using what was learned, beside the folder", code(loading)))
    parts.append(settings({**summary["settings"], **summary["versions"]}))
    return page("Images as prompts: tuning", lead, parts)


def told(summary: Mapping[str, Any]) -> str:
    """Tells what a tuning was, in a sentence without its end."""
    losses = [each["loss"] for each in summary["records"] if each["loss"] is not None]
    line = f"{counted(summary['steps'], 'step')} on {counted(summary['images'], 'image')}"
    if losses:
        line += f", loss {losses[0]:.4f}" + (f" at first and {losses[-1]:.4f} at last" if losses[1:] else "")
    line += f", {counted(summary['parameters'], 'number')} learned"
    return f"{line}, {summary['seconds']:.1f} s, {sized(summary['peak_bytes'])} of memory at most"


def pictures(what: str, shown: Sequence[str]) -> str:
    """Makes the section of images with variations."""
    return section("Images and their variations", paragraph(what), *shown)
