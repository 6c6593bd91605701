"""``dsd-fast match``: every image against every caption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsd_fast.cli.groups import command
from dsd_fast.cli.match.captions import read_captions
from dsd_fast.cli.match.options import MatchRequest
from dsd_fast.cli.terminal import SHOWN, CommandError, counted, end, printable, show_errors, show_line
from dsd_fast.jobs import storable


@command
def match(request: MatchRequest) -> None:
    """Score every image with every caption; higher is a better match.

    Writes scores.parquet (all scores) and results.json (the best captions of each image) into --out, with --report
    also report.html, a page that needs nothing else, and with --heatmaps K pictures and arrays of where each word of
    the K best captions is looked at. What an earlier run has left there is replaced. A file that cannot be used
    becomes an error row, and the run goes on.

    Exit code: 0 when every image was scored, 1 when some were not, 2 when nothing could be done, 130 after Ctrl-C,
    which keeps what has been scored.
    """
    captions = _captions(request)
    if request.heatmaps > request.top_k:
        raise CommandError(f"--heatmaps: got {request.heatmaps}, expected at most --top-k, {request.top_k}")
    config = request.score.config(request.memory)
    from dsd_fast.cli.match.run import run

    summary = run(request, captions, config)
    _show(summary, request.out)
    end(summary["complete"], summary["counts"]["errors"])


def _captions(request: MatchRequest) -> list[str]:
    file, texts = request.captions, request.caption or []
    if (file is None) == (not texts):
        raise CommandError("give either --captions FILE or --caption TEXT, one or more times")
    if file is not None:
        return read_captions(file)
    for number, text in enumerate(texts, start=1):
        # Bytes that are no UTF-8 arrive as lone surrogates.
        if storable(text) != text:
            raise CommandError(f"--caption number {number} ({text!r}) is not UTF-8 text")
    return texts


def _show(summary: dict[str, Any], out: Path) -> None:
    """Prints the best captions of the first images, the first errors, and the counts."""
    console = Console()
    scored = [entry for entry in summary["images"] if "ranked" in entry]
    errors = [entry["error"] for entry in summary["images"] if "error" in entry]
    if scored:
        table = Table("image", "caption", "score", title=f"best of {counted(len(summary['captions']), 'caption')}")
        table.columns[2].justify = "right"
        for column in table.columns[:2]:
            column.overflow = "fold"
        for entry in scored[:SHOWN]:
            for place, row in enumerate(entry["ranked"]):
                name = Text(printable(entry["path"])) if place == 0 else ""
                table.add_row(name, Text(printable(row["caption"])), f"{row['score']:.4f}")
            table.add_section()
        console.print(table)
    if len(scored) > SHOWN:
        console.print(f"and {counted(len(scored) - SHOWN, 'more image')} in results.json")
    rows = [(error["reason"], error["message"]) for error in errors]
    show_errors(console, "not scored", rows, len(rows), "results.json")
    counts = summary["counts"]
    line = f"{counted(counts['images'], 'image')}: {counts['scored']:,} scored, {counted(counts['errors'], 'error')}"
    if not summary["complete"]:
        line += f", {counts['not_reached']:,} not reached before the interruption"
    pairs, seconds = counts["scored"] * counts["captions"], summary["seconds"]
    line += f". {counted(pairs, 'pair')} in {seconds:.1f} s ({pairs / max(seconds, 1e-9):.1f} pairs/s)"
    if summary["settings"]["heatmaps"]:
        line += f", heat maps in {summary['heatmap_seconds']:.1f} s"
    show_line(console, f"{line}. Results: {out}")
