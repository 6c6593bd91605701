"""report.html of `dsd-fast features`: what was extracted, from which images, when, and how to read it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsd_fast.cli.features.pictures import Shown
from dsd_fast.cli.report import code, errors, image, lane, page, paragraph, section, settings, table, visible
from dsd_fast.cli.terminal import counted
from dsd_fast.jobs import Timeline

# Pictures of features on the page; the files have all.
_TILES = 400

_UNITS = ("B", "kB", "MB", "GB", "TB")


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
        parts.append(_timeline(line))
    parts += [_files(summary["files"]), section("Reading a feature", code(loading))]
    parts.append(settings({**chosen, **summary["versions"]}))
    return page("What the network makes of images", lead, parts)


def files_of(out: Path) -> list[tuple[str, int, int]]:
    """Lists (kind, files, bytes) of what lies in the folder, by the folder at the top and the ending."""
    found: dict[str, list[int]] = {}
    for parent, folders, names in os.walk(out):
        folders[:] = [name for name in folders if not name.startswith(".")]
        top = Path(parent).relative_to(out).parts[:1]
        for name in names:
            # The report cannot know its own size, and locks and files half written are no results.
            if name.startswith(".") or (not top and name == "report.html"):
                continue
            kind = f"{top[0]}/*{Path(name).suffix}" if top else name
            count = found.setdefault(kind, [0, 0])
            count[0] += 1
            count[1] += (Path(parent) / name).stat().st_size
    return [(kind, count, size) for kind, (count, size) in sorted(found.items())]


def sized(count: float) -> str:
    """Writes bytes with a unit: 1.5 MB."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:,.0f} {_UNITS[unit]}" if unit == 0 or count >= 100 else f"{count:.1f} {_UNITS[unit]}"


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


def _timeline(line: Timeline) -> str:
    spans = line.spans
    total = max(end for _, _, end in spans)
    rows = []
    for name in sorted({name for name, _, _ in spans}):
        own = [(start, end) for other, start, end in spans if other == name]
        rows.append([visible(name), lane(own, total), f"{line.seconds(name):.2f}"])
    return section(
        "When",
        paragraph(f"{line.overlap('write', 'compute'):.0%} of the writing went on while features were computed."),
        table(f"What was done in the {total:.1f} s of the last run", ["what", "when", "seconds"], rows, numbers=1),
    )


def _files(files: Sequence[tuple[str, int, int]]) -> str:
    rows = [[visible(kind), f"{count:,}", sized(size)] for kind, count, size in files]
    rows.append(["together", f"{sum(each[1] for each in files):,}", sized(sum(each[2] for each in files))])
    return section("Files", table("What lies in the folder", ["files", "count", "size"], rows, numbers=2))
