"""report.html of the demo: the tables that the terminal shows, and scenes with ranked captions and heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsd_fast.cli.demo.options import LABELS
from dsd_fast.cli.heatmaps import shown
from dsd_fast.cli.report import Card, card, cards, page, paragraph, section, settings, share, table, visible
from dsd_fast.cli.terminal import counted
from dsd_fast.images.overlay import enlarged
from dsd_fast.matching.heatmaps import Heatmap


def render(summary: Mapping[str, Any], images: Sequence[NDArray[np.uint8]], maps: Sequence[Sequence[Heatmap]]) -> bytes:
    """Makes the page.

    Args:
        summary: the content of results.json.
        images: of the first scenes, which are shown, (64, 64, 3).
        maps: of the true captions' words, for each of them.
    """
    counts, chosen = summary["counts"], summary["settings"]
    lead = [
        f"{counted(counts['images'], 'scene')} that the mini model was never trained on. Each has its true caption "
        "and captions that differ from it in one thing: a colour, a shape, the two objects' colours swapped, or the "
        "opposite relation. A diffusion model scores how well each caption explains the picture.",
        f"{counted(counts['pairs'], 'pair')} of scene and caption, "
        f"{counted(len(chosen['timesteps']), 'timestep')}. All figures are of this run on this machine.",
    ]
    parts = [
        _accuracy(summary["accuracy"]),
        _reference(summary["reference"]),
        _pointing(summary["pointing"]),
        _scenes(summary, images, maps),
        settings({**chosen, "layers": ", ".join(chosen["layers"]), **summary["versions"]}),
    ]
    return page("Does the true caption win?", lead, parts)


def _accuracy(accuracy: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = [
        [visible(LABELS[official["against"]]), str(official["n"]), f"{official['chance']:.2f}"]
        + [_figure(each) for each in (official, noise)]
        for official, noise in zip(accuracy["official"], accuracy["noise"], strict=True)
    ]
    return section(
        "Accuracy by kind of wrong caption",
        paragraph(
            "The official score is an attention term added to a noise term; the noise term is shown by itself too. "
            "The dot is the accuracy, the band its 95 % interval, the line what guessing would give."
        ),
        table(
            "How often the true caption scores higher",
            ["against", "n", "chance", "official score", "noise term alone"],
            rows,
            numbers=4,
        ),
    )


def _reference(found: Mapping[str, Any]) -> str:
    ratio = found["reference_seconds"] / found["seconds"]
    rows = [
        ["reference, in float32, pair by pair as the official code runs", f"{found['reference_seconds']:.2f}"],
        ["dsd-fast", f"{found['seconds']:.2f}"],
    ]
    return section(
        "The same scores, sooner",
        paragraph(
            f"{counted(found['pairs'], 'pair')} scored both ways on {counted(found['threads'], 'thread')}: "
            f"{ratio:.1f} times as fast, and the scores differ by at most {found['max_difference']:.1e}."
        ),
        table("The official score both ways", ["", "seconds"], rows, numbers=1),
    )


def _pointing(points: Sequence[Mapping[str, Any]]) -> str:
    rows = [[visible(row["word"]), str(row["n"]), f"{row['chance']:.2f}", _figure(row)] for row in points]
    return section(
        "Where words are looked at",
        paragraph(
            "A word's heat map is the share of the cross-attention that goes to it at each place. It hits if its "
            "largest value lies on the object that the word stands for; chance is the objects' share of the picture."
        ),
        table("How often a word's map hits its object", ["words for", "n", "chance", "hits"], rows, numbers=3),
    )


def _scenes(summary: Mapping[str, Any], images: Sequence[NDArray[np.uint8]], maps: Sequence[Sequence[Heatmap]]) -> str:
    made = []
    for entry, pixels, own in zip(summary["images"], images, maps, strict=False):
        image = Image.fromarray(pixels)
        rows = [{**row, "note": LABELS[row["kind"]], "right": row["kind"] == "true"} for row in entry["ranked"]]
        scores = [row["score"] for row in rows]
        found = shown(image, entry["caption"], own, len(own))
        made.append(
            card(
                Card(
                    f"Scene {entry['seed'] - summary['first_seed']}",
                    enlarged(image),
                    rows,
                    min(scores),
                    max(scores),
                    [found],
                )
            )
        )
    return section(
        "Scenes and their captions, best first",
        paragraph("The true caption is green. Bars go from a scene's lowest score to its highest."),
        cards(made, len(summary["images"])),
    )


def _figure(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    bar = share(row["accuracy"], (low, high), row["chance"])
    return f"{row['accuracy']:.2f} <small>({low:.2f} to {high:.2f})</small>{bar}"
