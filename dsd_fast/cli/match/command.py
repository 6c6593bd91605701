"""``dsd-fast match``: every image against every caption."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsd_fast.cli.groups import command
from dsd_fast.cli.match.captions import captions_of
from dsd_fast.cli.match.options import MatchRequest
from dsd_fast.cli.terminal import CommandError, counted, end, printable, show_errors, show_line


@command
def match(request: MatchRequest) -> None:
    """Score every image with every caption; higher is a better match.

    Writes a Parquet index into --out, a row for each image with its scores; and at the end, of the images given,
    scores.parquet (all scores) and results.json (the best captions of each image), with --report also report.html, a
    page that needs nothing else, and with --heatmaps K pictures and arrays of where each word of the K best captions is
    looked at. A run that was killed goes on when the same command is given again; other captions or settings for the
    same folder are refused. A file that cannot be used becomes an error row. Of several workers the last one to end
    writes the results.

    Exit code: 0 when every image was scored, 1 when some were not, 2 when nothing could be done, 130 after Ctrl-C,
    which keeps what has been scored.
    """
    request.workers.check(request.source.device)
    captions = captions_of(request)
    if request.heatmaps > request.top_k:
        raise CommandError(f"--heatmaps: got {request.heatmaps}, expected at most --top-k, {request.top_k}")
    # Text that is no value of its option is refused before torch is loaded for more.
    request.score.config(request.memory)
    from dsd_fast.cli.match.run import run

    numbers = run(request, captions)
    results = numbers["results"]
    _show(numbers, results, len(captions), request)
    end(results["complete"], results["counts"]["errors"])


def _show(numbers: dict[str, Any], results: dict[str, Any], captions: int, request: MatchRequest) -> None:
    """Prints the best captions of the first images, the first errors, and the counts."""
    console, counts = Console(), results["counts"]
    if "shown" in results:
        _show_images(console, results, captions)
    line = f"{counted(counts['images'], 'image')}: {counts['scored']:,} scored, "
    if before := numbers["done"] - numbers["done_errors"]:
        line += f"{before:,} of them before, "
    line += counted(counts["errors"], "error")
    if numbers["duplicates"]:
        line += f", {counted(numbers['duplicates'], 'duplicate')}"
    if counts["not_reached"]:
        why = "of other workers still to be scored" if results["complete"] else "not reached before the interruption"
        line += f", {counts['not_reached']:,} {why}"
    pairs, seconds = numbers["ok"] * captions, numbers["seconds"]
    line += f". {counted(pairs, 'pair')} in {seconds:.1f} s ({pairs / max(seconds, 1e-9):.1f} pairs/s)"
    if request.heatmaps and "shown" in results:
        line += f", {'' if results['complete'] else 'not all '}heat maps in {results['heatmap_seconds']:.1f} s"
    show_line(console, f"{line}. Results: {request.out}")


def _show_images(console: Console, results: dict[str, Any], captions: int) -> None:
    scored, counts = results["shown"], results["counts"]
    if scored:
        table = Table("image", "caption", "score", title=f"best of {counted(captions, 'caption')}")
        table.columns[2].justify = "right"
        for column in table.columns[:2]:
            column.overflow = "fold"
        for entry in scored:
            for place, row in enumerate(entry["ranked"]):
                name = Text(printable(entry["path"])) if place == 0 else ""
                table.add_row(name, Text(printable(row["caption"])), f"{row['score']:.4f}")
            table.add_section()
        console.print(table)
    if counts["scored"] > len(scored):
        console.print(f"and {counted(counts['scored'] - len(scored), 'more image')} in results.json")
    rows = [error[1:] for error in results["errors"]]
    show_errors(console, "not scored", rows, counts["errors"], "results.json")
