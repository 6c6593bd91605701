"""report.html of `dsd-fast gate`: which techniques to take, the pictures behind it, and where the score comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsd_fast.cli.report import errors, image, page, paragraph, section, settings, table, visible
from dsd_fast.cli.terminal import counted
from dsd_fast.features.gate import GateResult, GuideResult
from dsd_fast.images.overlay import enlarged

_TOLD = {True: "accepts", False: "rejects", None: "cannot tell"}
_SPACES = {"vae": "closer in latents", "clip": "closer in CLIP"}


def render(summary: Mapping[str, Any], names: Sequence[str], versions: Mapping[str, str]) -> bytes:
    """Makes the page.

    Args:
        summary: "result", "images", "errors", "verdict" of the run.
        names: of the images that were used.
        versions: of what computed it.
    """
    result: GateResult = summary["result"]
    lead = [
        summary["verdict"],
        f"{counted(summary['images'], 'image')}, {counted(len(result.shift.layers), 'layer')} at "
        f"{counted(len(result.shift.timesteps), 'timestep')} of {result.settings['model']}.",
    ]
    parts = [_ranking(result)]
    if result.guide is not None and result.guide.inputs:
        parts.append(_pictures(result.guide, names))
    parts.append(_scores(result))
    if summary["errors"]:
        parts.append(errors("Not used", "Images that could not be used", summary["errors"]))
    chosen = {**result.settings, **result.settings["extractor"], "layers": ", ".join(result.shift.layers), **versions}
    del chosen["extractor"]
    # What is None is told here: it may be a choice, as is no guide.
    parts.append(settings({name: str(value) for name, value in chosen.items()}))
    return page("Which techniques keep features true to the image?", lead, parts)


def _ranking(result: GateResult) -> str:
    spaces = () if result.guide is None else result.guide.spaces
    rows = []
    for row in result.rows():
        cells = [visible(row["technique"]), "<strong>yes</strong>" if row["take"] else "no", f"{row['score']:.3f}"]
        cells += [_interval(row, "score_gain", "+.3f"), *(_interval(row, f"{each}_gain", "+.0%") for each in spaces)]
        rows.append([*cells, "left out" if result.guide is None else _TOLD[row["accepted"]]])
    agreement = [
        f"{value:.2f} ({_SPACES[space].rpartition(' ')[2]})"
        for space, value in result.agreement().items()
        if value is not None
    ]
    told = ""
    if agreement:
        words = " and ".join(agreement)
        told = paragraph(f"Rank correlation between the gain in score and what img2img says, over techniques: {words}.")
    anchor, strong = result.shift.anchor
    header = ["technique", "take", "score", "gain", *(_SPACES[space] for space in spaces), "img2img"]
    return section(
        "Ranking",
        paragraph(
            "The score is 1 where a feature of a noised image is as sharp at each place as that of the clean image, "
            f"and 0 where it is as far off as the anchor, “{anchor}” at t = {strong}. The gain is over the empty "
            "prompt and nothing else. A technique is taken if its gain is above 0 by its 95 % interval over images, "
            "and if img2img does not reject it. Img2img accepts what comes closer to the image by intervals above 0, "
            "rejects what goes farther by one below 0, and cannot tell in between, nor of a way to make latents, which "
            "does not enter it."
        ),
        table("Techniques, the largest gain first", header, rows, numbers=len(header) - 1),
        told,
    )


def _pictures(guide: GuideResult, names: Sequence[str]) -> str:
    chosen = [k for k, same in enumerate(guide.unchanged) if k == 0 or not same]
    rows = []
    for n, (given, name) in enumerate(zip(guide.inputs, names, strict=False)):
        cells = [f"{image(enlarged(given), name)}<bdi>{visible(name)}</bdi>"]
        for k in chosen:
            far = ", ".join(f"{space} {guide.distances[k, s, n]:.2f}" for s, space in enumerate(guide.spaces))
            made = image(enlarged(guide.outputs[k][n]), f"What img2img makes of {name}: {guide.techniques[k]}")
            cells.append(f"{made}<small>{far}</small>")
        rows.append(cells)
    return section(
        "What img2img makes of the images",
        paragraph("Below each picture how far it is from the image: in latents, and 1 − cosine in CLIP's space."),
        table("Contact sheet", ["image", *(guide.techniques[k] for k in chosen)], rows),
    )


def _scores(result: GateResult) -> str:
    shift = result.shift
    rows = []
    means = shift.scores.mean(-1)
    for i, layer in enumerate(shift.layers):
        for s, t in enumerate(shift.timesteps):
            rows.append([visible(layer), str(t), *(f"{means[k, i, s]:.3f}" for k in range(len(shift.techniques)))])
    return section(
        "Scores by layer and timestep",
        table("Mean over images", ["layer", "t", *shift.techniques], rows, numbers=1 + len(shift.techniques)),
    )


def _interval(row: Mapping[str, Any], key: str, form: str) -> str:
    return f"{row[key]:{form}} <small>({row[f'{key}_low']:{form}} to {row[f'{key}_high']:{form}})</small>"
