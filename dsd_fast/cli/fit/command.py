"""``dsd-fast fit``: adapts the score to the groups of a data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsd_fast.cli.fit.options import FitRequest
from dsd_fast.cli.groups import command
from dsd_fast.cli.terminal import EXIT_INTERRUPTED, CommandError, counted, fail, show_line


@command
def fit(request: FitRequest) -> None:
    """Adapt the score to the groups of a data set: a LoRA, learned prompt vectors, or weights of heads.

    Writes the fitted matcher into --out, which `dsd-fast evaluate --matcher` and `Matcher.load` take, and history.json:
    settings, versions, and each look at the training. With held-out groups the parameters that do best on them are
    kept. A LoRA's file is one that stock diffusers loads.

    The same command goes on where an earlier one was stopped, even by kill -9, to the same result. One with other
    settings is refused.

    Exit code: 0 when the fit is done, 2 when nothing could be done, 130 after Ctrl-C, which keeps the checkpoint.
    """
    data = request.data
    if data.validation is not None and data.validation_split is not None:
        raise CommandError("give --validation or --validation-split, not both")
    score, config = request.score.config(request.memory), request.fit.config()
    from dsd_fast.cli.fit.run import hold_out, run
    from dsd_fast.matching.fitting.config import parse_methods
    from dsd_fast.training import CHECKPOINT

    methods = parse_methods(request.fit.method or "lora")
    if request.official_lora and "lora" not in methods:
        raise CommandError("--official-lora: there is no LoRA without --method lora")
    groups, held_out = data.groups(), None
    if data.validation is not None:
        held_out = replace(data, data=data.validation, official_split=False, limit=None).groups()
    elif data.validation_split is not None:
        groups, held_out = hold_out(groups, data.validation_split, config.seed)
    try:
        summary = run(request, groups, held_out, score, config, methods)
    except KeyboardInterrupt:
        kept = (request.out / CHECKPOINT).is_file()
        goes_on = f"; the same command goes on from the checkpoint in {request.out}" if kept else ""
        fail(f"interrupted{goes_on}", EXIT_INTERRUPTED)
    _show(summary, request.out)


def _show(summary: dict[str, Any], out: Path) -> None:
    """Prints held-out accuracy and loss before and after, and what was done."""
    console = Console()
    if summary["before"] is not None:
        console.print(_table(summary))
    counts, losses = summary["counts"], [r["loss"] for r in summary["records"] if r["loss"] is not None]
    line = f"{counted(summary['steps'], 'step')} on {counted(counts['groups'], 'group')}"
    line += ", stopped early by --patience" if summary["stopped_early"] else ""
    if losses:
        line += f", loss {losses[0]:.4f} at first and {losses[-1]:.4f} at last"
    show_line(console, f"{line}. {summary['seconds']:.1f} s. Matcher: {out}")


def _table(summary: dict[str, Any]) -> Table:
    before, after = summary["before"], summary["after"]
    table = Table(
        "",
        "before",
        f"after {counted(after['step'], 'step')}",
        title=counted(summary["counts"]["held_out"], "held-out question"),
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("accuracy", f"{before['accuracy']:.3f}", f"{after['accuracy']:.3f}")
    intervals = (f"{look['interval'][0]:.3f} to {look['interval'][1]:.3f}" for look in (before, after))
    table.add_row("95 % interval", *intervals)
    losses = ("-" if look["loss"] is None else f"{look['loss']:.4f}" for look in (before, after))
    table.add_row("loss", *losses)
    return table
