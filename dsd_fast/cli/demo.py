"""``dsd-fast demo``: the mini model tells true captions from nearly true ones, beside the reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsd_fast.cli import options
from dsd_fast.cli.terminal import EXIT_ERRORS, counted, fail, one_sentence, printable

if TYPE_CHECKING:
    from rich.console import Console

# Scenes whose ranked captions are shown.
_EXAMPLES = 3

LABELS = {
    "true": "true",
    "colour": "another colour",
    "shape": "another shape",
    "swap": "colours swapped",
    "relation": "opposite relation",
    "all": "all of its scene",
}


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report, the pictures and the results.")] = Path("demo"),
    scenes: Annotated[int, typer.Option(min=1, help="Scenes to score.")] = 150,
    reference_scenes: Annotated[int, typer.Option(min=1, help="How many of them the reference scores too.")] = 8,
    timesteps: options.Timesteps = "4",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: options.Device = "cpu",
) -> None:
    """Match held-out scenes of the mini model with true and nearly true captions.

    Writes report.html, a page to look at, beside scores.parquet and results.json. Each scene's caption stands against
    captions that differ in one thing: a colour, a shape, the objects' colours swapped, or the opposite relation. Some
    scenes are scored by the plain reference too, pair by pair as the official code runs; if any score differs by more
    than 1e-4 the exit code is 1.
    """
    with one_sentence():
        steps = options.parse_timesteps(timesteps)
        options.quiet_transformers()
        from dsd_fast.cli.demo_run import TOLERANCE, run

        summary = run(out, scenes, min(reference_scenes, scenes), steps, seed, device)
    _show(summary, out)
    difference = summary["reference"]["max_difference"]
    # Not `>`: a difference that is no number is a failure too.
    if not difference <= TOLERANCE:
        fail(f"scores differ from the reference's by up to {difference:.2g}, more than {TOLERANCE:g}", EXIT_ERRORS)


def _show(summary: dict[str, Any], out: Path) -> None:
    from rich.console import Console

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
    console.print(f"To look at: {printable(str(out / 'report.html'))}", soft_wrap=True, markup=False, highlight=False)


def _show_accuracy(console: Console, summary: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title="How often the true caption scores higher, with its 95 % interval", title_justify="left")
    table.add_column("against")
    for name in ("n", "chance", "official score", "noise term alone"):
        table.add_column(name, justify="right")
    for rows in zip(summary["accuracy"]["official"], summary["accuracy"]["noise"], strict=True):
        first = rows[0]
        if first["against"] == "all":
            table.add_section()
        cells = [f"{row['accuracy']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})" for row in rows]
        table.add_row(LABELS[first["against"]], str(first["n"]), f"{first['chance']:.2f}", *cells)
    console.print(table)


def _show_pointing(console: Console, summary: dict[str, Any]) -> None:
    from rich.table import Table

    title = "How often a word's heat map is largest on its object, with its 95 % interval"
    table = Table(title=title, title_justify="left")
    table.add_column("words for")
    for name in ("n", "chance", "hits"):
        table.add_column(name, justify="right")
    for row in summary["pointing"]:
        low, high = row["interval"]
        hits = f"{row['accuracy']:.2f} ({low:.2f} to {high:.2f})"
        table.add_row(row["word"], str(row["n"]), f"{row['chance']:.2f}", hits)
    console.print(table)


def _show_examples(console: Console, summary: dict[str, Any]) -> None:
    from rich.table import Table

    count = min(_EXAMPLES, len(summary["images"]))
    title = f"The first {counted(count, 'scene')}, captions ranked by the official score"
    table = Table(title=title, title_justify="left")
    table.add_column("scene", justify="right")
    table.add_column("caption")
    table.add_column("which is")
    table.add_column("score", justify="right")
    for entry in summary["images"][:count]:
        for place, row in enumerate(entry["ranked"]):
            name = str(entry["seed"] - summary["first_seed"]) if place == 0 else ""
            style = "green" if row["kind"] == "true" else None
            table.add_row(name, row["caption"], LABELS[row["kind"]], f"{row['score']:.4f}", style=style)
        table.add_section()
    console.print(table)


def _show_reference(console: Console, summary: dict[str, Any]) -> None:
    from rich.table import Table

    found = summary["reference"]
    pairs = f"{counted(found['pairs'], 'pair')} ({counted(found['scenes'], 'scene')})"
    table = Table(title=f"The official score of {pairs} both ways", title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_row("reference, pair by pair as the official code runs", f"{found['reference_seconds']:.2f}")
    table.add_row("dsd-fast", f"{found['seconds']:.2f}")
    console.print(table)
    ratio = found["reference_seconds"] / found["seconds"]
    console.print(
        f"{ratio:.1f} times as fast on {counted(found['threads'], 'thread')}; "
        f"the scores differ by at most {found['max_difference']:.1e}.",
        highlight=False,
    )
