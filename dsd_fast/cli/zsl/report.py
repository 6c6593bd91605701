"""report.html of `dsd-fast zsl`: figures beside their baselines, what they depend on, and what the tokens do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dsd_fast.cli.report import errors, image, page, paragraph, section, settings, table, visible

LEAKAGE = (
    "“Unseen” says that no image of these classes was learned from here. CLIP and Stable Diffusion have been trained "
    "on images and texts of the web: they have met these classes' names, and most likely pictures of them. The guide's "
    "prototypes are CLIP's texts of these names, by a text tower that is Stable Diffusion 1's own. So the figures do "
    "not compare with those of methods that know attributes alone; they compare with the rows for the plain prompt and "
    "for CLIP, which know the same."
)

_METHODS = {
    "token": "class tokens",
    "plain": "plain prompt",
    "ensemble": "template ensemble",
    "clip": "CLIP",
    "real": "real images",
}
_FIGURES = {"t1": "T1", "u": "U", "s": "S", "h": "H"}
# Of lines, by figure.
_DASHES = {"t1": "2 4", "u": "8 4", "s": "2 2", "h": "none"}
_WIDTH, _HEIGHT, _EDGE = 640, 260, 44
# Longest side of an image.
_SIDE = 160


def render(results: Mapping[str, Any], out: Path) -> bytes:
    """Makes the page.

    Args:
        results: of the run, and "versions".
        out: the run's folder.
    """
    # Of the classifier that γ is chosen by, and not of the one that is better on these very images.
    data, first = results["data"], results["table"][0]
    lead = [
        f"{len(data['unseen'])} unseen and {len(data['seen'])} seen classes: H {first['h']:.3f} by class tokens with "
        f"{first['classifier']}, T1 {first['t1']:.3f}.",
        LEAKAGE,
    ]
    parts = [_table(results), _sheets(results["sheets"], out)]
    curves = results["sensitivity"]
    lines = _chart(curves["penalty"], "penalty", "λ") + paragraph(
        "T1 does not depend on λ. A λ that is chosen by these images themselves would be no result."
    )
    parts.append(section("How much depends on λ", lines))
    parts.append(section("How many generated images are needed", _chart(curves["images"], "images", "images a class")))
    if results["tsne"]:
        parts.append(_plane(results["tsne"]))
    parts.append(_tokens(results))
    if results["errors"]:
        rows = [("", "unusable", each) for each in results["errors"]]
        parts.append(errors("Not used", "Images that could not be used", rows, len(rows), "results.json"))
    parts.append(settings({**results["settings"], **results["versions"]}))
    return page("Zero-shot learning by class tokens", lead, parts)


def _table(results: Mapping[str, Any]) -> str:
    rows = []
    for row in results["table"]:
        cells = [visible(_METHODS[row["method"]]), visible(row["classifier"])]
        for name in _FIGURES:
            low, high = row["intervals"][name]
            cells.append(f"{row[name]:.3f} <small>({low:.3f} to {high:.3f})</small>")
        tuned = row["test_tuned"]
        rows.append([*cells, f"{row['penalty']:.3f}", f"{tuned['h']:.3f} <small>(λ {tuned['penalty']:.3f})</small>"])
    told = "λ and γ were chosen on the validation classes, which are seen ones."
    if not results["data"]["validation"]:
        told = "There were no validation classes: λ is 0."
    if repeated := results["data"]["test_images_learned_from"]:
        told += f" {len(repeated)} test images, {repeated[0]} the first, are training images too: "
        told += "figures of their classes say too much."
    tried = "; ".join(f"γ {each['gamma']:g}: H {each['h']:.3f}" for each in results["choice"]["tried"])
    return section(
        "Figures",
        paragraph(
            "Means over classes. T1: images of unseen classes among these alone; U and S: images of unseen and of seen "
            "classes among all; H: their harmonic mean. Intervals are 95 %, over test images. The last column is H at "
            "the λ that is best for the test images themselves: an upper bound, and no result."
        ),
        table(
            "Class tokens and their baselines",
            ["method", "classifier", *_FIGURES.values(), "λ", "H, test-tuned"],
            rows,
            numbers=6,
        ),
        paragraph(told + (f" On these {tried}." if tried else "")),
    )


def _sheets(sheets: Sequence[Mapping[str, Any]], out: Path) -> str:
    articles = ""
    for sheet in sheets:
        name, columns = sheet["class"], len(sheet["times"])
        with Image.open(out / sheet["file"]) as picture:
            # Small ones by whole numbers, so that each pixel stays a sharp square.
            larger = max(1, _SIDE * columns // picture.width)
            shown = picture.resize([larger * side for side in picture.size], Image.Resampling.NEAREST)
        shown.thumbnail((_SIDE * columns, 2 * _SIDE))
        drawn = image(shown, f"{name}: without the token above, with it below")
        articles += f"<article>\n<h3><bdi>{visible(name)}</bdi></h3>\n{drawn}</article>\n"
    times = ", ".join(f"{t:g}" for t in sheets[0]["times"][:-1])
    return section(
        "What the tokens change",
        paragraph(
            "Of the same noise, at the same steps: above of the text without the token, below with it. From left to "
            f"right what the network takes the image for at timesteps {times}, and the image."
        ),
        articles,
    )


def _chart(points: Sequence[Mapping[str, float]], x: str, label: str) -> str:
    """Draws T1, U, S and H, from 0 to 1, against what changes."""
    largest = max(point[x] for point in points) or 1
    width, height = _WIDTH - 2 * _EDGE, _HEIGHT - 2 * _EDGE
    lines = ""
    for name, title in _FIGURES.items():
        places = [(_EDGE + width * point[x] / largest, _EDGE + height * (1 - point[name])) for point in points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        start = _EDGE + 90 * list(_FIGURES).index(name)
        for points_of_line in (path, f"{start},16 {start + 36},16"):
            lines += (
                f'<polyline points="{points_of_line}" fill="none" stroke="currentColor" '
                f'stroke-dasharray="{_DASHES[name]}"/>'
            )
        lines += _text(start + 42, 20, title)
    axis = f'<rect class="track" x="{_EDGE}" y="{_HEIGHT - _EDGE}" width="{width}" height="1"/>'
    ends = _text(8, _HEIGHT - _EDGE + 4, "0") + _text(8, _EDGE + 4, "1") + _text(_EDGE, _HEIGHT - 20, "0")
    ends += _text(_WIDTH - 4 * _EDGE, _HEIGHT - 20, f"{label}: {largest:g}")
    return _drawing(f"T1, U, S and H against {label}", axis + ends + lines)


def _plane(points: Sequence[Mapping[str, Any]]) -> str:
    """Draws tokens and names where t-SNE has placed them."""
    xs, ys = ([point[axis] for point in points] for axis in "xy")
    marks = ""
    for point in points:
        a, b = (
            _EDGE + (side - 2 * _EDGE) * (point[axis] - min(values)) / ((max(values) - min(values)) or 1)
            for axis, values, side in (("x", xs, _WIDTH), ("y", ys, 2 * _HEIGHT))
        )
        kind = "dot" if point["kind"] == "token" else "interval"
        marks += f'<circle class="{kind}" cx="{a:.1f}" cy="{b:.1f}" r="4"/>' + _text(a + 6, b + 3, point["class"], 9)
    return section(
        "Where the tokens are",
        paragraph("t-SNE of the learned vectors (dark) and of the mean vectors of the classes' names (pale)."),
        _drawing("t-SNE of tokens and names", marks, 2 * _HEIGHT),
    )


def _text(x: float, y: float, text: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="currentColor" font-size="{size}">{visible(text)}</text>'


def _drawing(title: str, content: str, height: int = _HEIGHT) -> str:
    return f'<svg role="img" aria-label="{visible(title)}" viewBox="0 0 {_WIDTH} {height}">{content}</svg>\n'


def _tokens(results: Mapping[str, Any]) -> str:
    told = next(row["per_class"] for row in results["table"] if row["method"] == "token")
    accuracy = dict(zip(results["data"]["classes"], told, strict=True))
    rows = []
    for name, about in results["tokens"].items():
        share = accuracy[name]
        cells = [f"<bdi>{visible(name)}</bdi>", f"<bdi>{visible(about['token'])}</bdi>", visible(str(about["ended"]))]
        norm, probability = (about.get(key) for key in ("norm", "probability"))
        numbers = [
            str(about["images"]),
            str(about["updates"]),
            *("–" if each is None else f"{each:.2f}" for each in (probability, norm, share)),
        ]
        rows.append([*cells, *numbers])
    header = ["class", "token", "ended by", "images", "updates", "probability", "norm", "accuracy"]
    return section(
        "Tokens",
        paragraph(
            "The probability is the guide's, of the images learned from; the norm is in means of the vocabulary's; the "
            "accuracy is of the class's test images, among all classes."
        ),
        table("Each unseen class", header, rows, numbers=5),
    )
