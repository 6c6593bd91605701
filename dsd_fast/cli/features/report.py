"""report.html of `dsd-fast features`: what was extracted, from which images, when, and how to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsd_fast.cli.features.pictures import Shown
from dsd_fast.cli.job_report import files, timeline
from dsd_fast.cli.report import code, errors, image, page, paragraph, section, settings, table, visible
from dsd_fast.cli.terminal import counted
from dsd_fast.jobs import Timeline

# Pictures of features on the page; the files have all.
_TILES = 400


def render(
    summary: Mapping[str, Any],
    shown: Sequence[Shown],
    layers: Sequence[str],
    line: Timeline,
    loading: str,
) -> bytes:
    """Makes the page.

    Args:
        summary: of the run: "folder" (counts over all runs), "counts" (of this one), "settings", "versions", "errors",
            "shapes", "files".
        shown: images with pictures of their features.
        layers: of those pictures.
        line: what was done when.
        loading: Python that reads a feature.
    """
    chosen, folder = summary["settings"], summary["folder"]
    lead = [
        f"{counted(folder['ok'], 'image')} with features of {chosen['model']}: "
        f"{counted(len(summary['shapes']), 'layer')} at {counted(len(chosen['timesteps']), 'timestep')}."
    ]
    if folder["errors"]:
        lead.append(f"{counted(folder['errors'], 'image')} could not be used; the reasons are below.")
    parts = [_pictures(shown, layers)] if shown else []
    parts.append(_layers(summary))
    if folder["errors"]:
        rows = [(error["path"] or error["name"], error["reason"], error["message"]) for error in summary["errors"]]
        parts.append(errors("No features", "Images that could not be used", rows, folder["errors"], "the index"))
    if line.spans:
        parts.append(timeline(line, {"write": "writing"}, "features were computed"))
    parts += [files(summary["files"]), section("Reading a feature", code(loading))]
    parts.append(settings({**chosen, **summary["versions"]}))
    return page("What the network makes of images", lead, parts)


def _pictures(shown: Sequence[Shown], layers: Sequence[str]) -> str:
    rows: list[list[str]] = []
    left = 0
    for each in shown:
        for number, (t, tiles) in enumerate(each.rows.items()):
            if len(rows) * len(layers) >= _TILES:
                left += 1
                continue
            first = image(each.image, each.name) if number == 0 else ""
            name = f"<bdi>{visible(each.name)}</bdi>" if number == 0 else ""
            cells = [
                image(tile, f"{layer} at t = {t} of {each.name}") for tile, layer in zip(tiles, layers, strict=True)
            ]
            rows.append([f"{first}{name}", str(t), *cells])
    more = paragraph(f"{counted(left, 'more row')} in the files.") if left else ""
    return section(
        "Features as colours",
        paragraph(
            "The first three principal components as red, green and blue, one PCA over these images for each layer and "
            "timestep: places of like features have like colours, in all images of a column and timestep."
        ),
        table("Images and their features", ["image", "t", *layers], rows),
        more,
    )


def _layers(summary: Mapping[str, Any]) -> str:
    rows = [[visible(name), " × ".join(map(str, shape))] for name, shape in summary["shapes"].items()]
    return section(
        "Layers",
        table("Shapes of a feature, for each timestep", ["layer", "channels × height × width"], rows, numbers=1),
    )
