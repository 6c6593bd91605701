"""``dsd-fast evaluate``: how often the right candidate of each group of a data set wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsd_fast.cli.evaluate.options import EvaluateRequest
from dsd_fast.cli.groups import command
from dsd_fast.cli.options import ScoreOptions
from dsd_fast.cli.terminal import SHOWN, CommandError, counted, end, printable, show_errors, show_line

_LABELS = {
    "accuracy": "accuracy (R@1)",
    "median_rank": "median rank",
    "mean_reciprocal_rank": "mean reciprocal rank",
    "text": "text score",
    "image": "image score",
    "group": "group score",
}


@command
def evaluate(request: EvaluateRequest) -> None:
    """Count how often the right candidate of each group of a data set scores highest.

    Writes results.json (figures with 95 % intervals, overall and by category) and groups.parquet (the scores and the
    rank of each group) into --out. Each pair is scored by itself and a tie is a mistake, unless --batch-mean and --ties
    ask for the official code's conventions. A group with an image that cannot be used becomes an error row and counts
    in no figure, and the run goes on.

    Exit code: 0 when every group was scored, 1 when some were not, or have scores that are no finite numbers, 2 when
    nothing could be done, 130 after Ctrl-C, which keeps what has been scored.
    """
    if request.matcher is not None:
        _refuse_settings(request.context)
    config = request.score.config(request.memory)
    groups = request.data.groups()
    from dsd_fast.cli.evaluate.run import run

    summary = run(request, groups, config)
    _show(summary, request.out)
    end(summary["complete"], summary["counts"]["errors"] + summary["counts"]["not_finite"])


def _refuse_settings(context: typer.Context) -> None:
    """A fitted matcher has the settings that it was fitted with."""
    names = {field.name for field in fields(ScoreOptions)}
    own = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names
        and (source := context.get_parameter_source(parameter.name))
        and source.name == "COMMANDLINE"
    ]
    if own:
        raise CommandError(f"--matcher brings its own settings, so leave out {', '.join(own)}")


def _show(summary: dict[str, Any], out: Path) -> None:
    """Prints the figures, overall, by part and by category, the first errors, and the counts."""
    console = Console()
    if summary["figures"]:
        table = Table("groups", "figure", "value", "95 % interval", "n", "chance")
        for column in table.columns[2:]:
            column.justify = "right"
        sections = {"all": summary["figures"]}
        sections |= {f"{part} part alone": alone["figures"] for part, alone in summary["parts"].items()}
        categories = list(summary["by_category"].items())
        sections |= {f"category {name or '(none)'}": figures for name, figures in categories[:SHOWN]}
        for section, figures in sections.items():
            for place, (name, figure) in enumerate((n, f) for n, f in figures.items() if n != "R@1"):
                table.add_row(Text(printable(section)) if place == 0 else "", *_cells(name, figure))
            table.add_section()
        console.print(table)
        if len(categories) > SHOWN:
            console.print(f"and {len(categories) - SHOWN:,} more categories in results.json")
    rows = [(error["id"], error["reason"], error["message"]) for error in summary["errors"]]
    show_errors(console, "not scored", rows, len(rows), "results.json", header=("group", "reason", "what"))
    counts, pairs, seconds = summary["counts"], summary["pairs"], summary["seconds"]
    line = f"{counted(counts['groups'], 'group')}: {counts['scored']:,} scored, {counted(counts['errors'], 'error')}"
    if counts["not_finite"]:
        line += f", {counts['not_finite']:,} with scores that are no finite numbers, which --dtype float32 may avoid"
    if not summary["complete"]:
        line += f", {counts['not_reached']:,} not reached before the interruption"
    line += f". {counted(pairs, 'pair')} in {seconds:.1f} s ({pairs / max(seconds, 1e-9):.1f} pairs/s)"
    show_line(console, f"{line}. Results: {out}")


def _cells(name: str, figure: Mapping[str, Any]) -> list[str]:
    digits = 1 if name == "median_rank" else 3
    low, high = figure["bootstrap"]
    chance = "" if figure["chance"] is None else f"{figure['chance']:.{digits}f}"
    return [
        _LABELS.get(name, name),
        f"{figure['value']:.{digits}f}",
        f"{low:.{digits}f} to {high:.{digits}f}",
        f"{figure['n']:,}",
        chance,
    ]
