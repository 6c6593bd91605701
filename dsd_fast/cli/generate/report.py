"""report.html of `dsd-fast generate`: what was made, of which classes, what was rejected, when, and with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dsd_fast.cli.job_report import files, timeline
from dsd_fast.cli.report import code, errors, image, page, paragraph, section, settings, table, visible
from dsd_fast.cli.terminal import counted
from dsd_fast.jobs import Timeline

# Classes on the page; the card and the index have all.
_CLASSES = 1000


@dataclass(frozen=True)
class Tile:
    """An image of the contact sheet.

    Attributes:
        picture: small enough for the page.
        prompt, seed: of it.
    """

    picture: Image.Image
    prompt: str
    seed: int


def render(summary: Mapping[str, Any], tiles: Sequence[Tile], line: Timeline, loading: str) -> bytes:
    """Makes the page.

    Args:
        summary: of the run: "folder", what the closing step tells; "settings", "versions", "errors", "files".
        tiles: of the contact sheet.
        line: what was done when.
        loading: Python that reads an image.
    """
    folder = summary["folder"]
    failed = sum(folder["errors"].values())
    lead = [f"{counted(folder['images'], 'image')} by {summary['settings']['model']}. No safety checker has seen them."]
    if failed:
        lead.append(f"{counted(failed, 'row')} could not be made; the reasons are below.")
    if folder["near_duplicates"]:
        lead.append(f"{counted(folder['near_duplicates'], 'image')} marked as nearly the same as another of the class.")
    parts = [_sheet(tiles, folder["images"])] if tiles else []
    if folder["classes"]:
        parts.append(_classes(folder["classes"]))
    if folder["rejected"]:
        parts.append(_rejected(folder["rejected"]))
    if failed:
        rows = [(error["name"] or error["prompt"], error["reason"], error["message"]) for error in summary["errors"]]
        parts.append(errors("No image", "Rows that could not be made", rows, failed, "the index", first="row"))
    if line.spans:
        parts.append(timeline(line, {"encode": "encoding", "write": "writing"}, "images were computed"))
    parts += [files(summary["files"]), section("Reading an image, inside the folder", code(loading))]
    parts.append(settings({**summary["settings"], **summary["versions"]}))
    return page("Images from texts", lead, parts)


def _sheet(tiles: Sequence[Tile], total: int) -> str:
    figures = "".join(
        f"<figure>{image(tile.picture, tile.prompt or 'an image of the empty prompt')}"
        f"<figcaption><bdi>{visible(tile.prompt)}</bdi> <span>seed {tile.seed}</span></figcaption></figure>\n"
        for tile in tiles
    )
    return section(
        "Contact sheet",
        paragraph(f"{counted(len(tiles), 'image')} of {total:,}, classes in turn, each with its prompt and its seed."),
        f'<div class="maps">\n{figures}</div>\n',
    )


def _classes(classes: Sequence[Mapping[str, Any]]) -> str:
    counts = [each["images"] for each in classes]
    rows = [
        [visible(each["label"]), str(each["cls"]), f"{each['images']:,}", f"{each['errors']:,}"]
        for each in classes[:_CLASSES]
    ]
    return section(
        "Classes",
        paragraph(f"{len(classes):,} in all, with {min(counts):,} to {max(counts):,} images each."),
        table("Images of each class", ["class", "index", "images", "errors"], rows, numbers=3),
    )


def _rejected(rejected: Mapping[str, int]) -> str:
    rows = [[visible(reason), f"{count:,}"] for reason, count in rejected.items()]
    return section("Rejected", table("Tries that were not accepted", ["reason", "tries"], rows, numbers=1))
