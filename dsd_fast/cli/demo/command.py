"""``dsd-fast demo``: the mini model tells true captions from nearly true ones, beside the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from dsd_fast.cli.demo.options import LABELS, DemoRequest
from dsd_fast.cli.groups import command
from dsd_fast.cli.options import parse_timesteps, quiet_transformers
from dsd_fast.cli.terminal import EXIT_ERRORS, counted, fail, show_line, table

# Scenes whose ranked captions are shown.
_EXAMPLES = 3


@command
def demo(request: DemoRequest) -> None:
    """Match held-out scenes of the mini model with true and nearly true captions.

    Writes report.html, a page to look at, beside scores.parquet and results.json. Each scene's caption stands against
    captions that differ in one thing: a colour, a shape, the objects' colours swapped, or the opposite relation. Some
    scenes are scored by the plain reference too, in float32, pair by pair as the official code runs; if any score
    differs by more than 1e-4, or in a type of 16 bits by more than its rounding explains, the exit code is 1.
    """
    steps = parse_timesteps(request.timesteps)
    quiet_transformers()
    from dsd_fast.cli.demo.run import run

    summary = run(request, steps)
    _show(summary, request.out)
    difference, limit = (summary["reference"][name] for name in ("max_difference", "tolerance"))
    # Not `>`: a difference that is no number is a failure too.
    if not difference <= limit:
        fail(f"scores differ from the reference's by up to {difference:.2g}, more than {limit:g}", EXIT_ERRORS)


def _show(summary: dict[str, Any], out: Path) -> None:
    console = Console()
    steps = len(summary["settings"]["timesteps"])
    console.print(
        f"\n{counted(summary['counts']['images'], 'scene')} from seed {summary['first_seed']:,} on, which the mini "
        f"model was never trained on, {counted(summary['counts']['pairs'], 'pair')} of scene and caption, "
        f"{counted(steps, 'timestep')}. The official score adds the attention term to the noise term. "
        "All figures are of this run on this machine.\n",
        highlight=False,
    )
    _show_accuracy(console, summary)
    _show_pointing(console, summary)
    _show_examples(console, summary)
    _show_reference(console, summary)
    show_line(console, f"To look at: {out / 'report.html'}")


def _show_accuracy(console: Console, summary: dict[str, Any]) -> None:
    title = "How often the true caption scores higher, with its 95 % interval"
    whole = table(title, "against", "n", "chance", "official score", "noise term alone")
    for rows in zip(summary["accuracy"]["official"], summary["accuracy"]["noise"], strict=True):
        first = rows[0]
        if first["against"] == "all":
            whole.add_section()
        cells = [f"{row['accuracy']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})" for row in rows]
        whole.add_row(LABELS[first["against"]], str(first["n"]), f"{first['chance']:.2f}", *cells)
    console.print(whole)


def _show_pointing(console: Console, summary: dict[str, Any]) -> None:
    title = "How often a word's heat map is largest on its object, with its 95 % interval"
    whole = table(title, "words for", "n", "chance", "hits")
    for row in summary["pointing"]:
        low, high = row["interval"]
        hits = f"{row['accuracy']:.2f} ({low:.2f} to {high:.2f})"
        whole.add_row(row["word"], str(row["n"]), f"{row['chance']:.2f}", hits)
    console.print(whole)


def _show_examples(console: Console, summary: dict[str, Any]) -> None:
    count = min(_EXAMPLES, len(summary["images"]))
    title = f"The first {counted(count, 'scene')}, captions ranked by the official score"
    whole = table(title, "scene", "caption", "which is", "score", names=3)
    whole.columns[0].justify = "right"
    for entry in summary["images"][:count]:
        for place, row in enumerate(entry["ranked"]):
            name = str(entry["seed"] - summary["first_seed"]) if place == 0 else ""
            style = "green" if row["kind"] == "true" else None
            whole.add_row(name, row["caption"], LABELS[row["kind"]], f"{row['score']:.4f}", style=style)
        whole.add_section()
    console.print(whole)


def _show_reference(console: Console, summary: dict[str, Any]) -> None:
    compared = summary["reference"]
    pairs = f"{counted(compared['pairs'], 'pair')} ({counted(compared['scenes'], 'scene')})"
    whole = table(f"The official score of {pairs} both ways", "", "seconds")
    whole.add_row(
        "reference, in float32, pair by pair as the official code runs", f"{compared['reference_seconds']:.2f}"
    )
    whole.add_row("dsd-fast", f"{compared['seconds']:.2f}")
    console.print(whole)
    ratio = compared["reference_seconds"] / compared["seconds"]
    console.print(
        f"{ratio:.1f} times as fast on {counted(compared['threads'], 'thread')}; "
        f"the scores differ by at most {compared['max_difference']:.1e}.",
        highlight=False,
    )
