"""``dsd-fast bench``: measures a suite; ``dsd-fast bench-docs``: makes the documents' tables and plots from records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsd_fast.bench.documents import RESULTS
from dsd_fast.cli import options
from dsd_fast.cli.terminal import EXIT_ERRORS, CommandError, counted, one_sentence, printable

if TYPE_CHECKING:
    from rich.console import Console

    from dsd_fast.bench.case import Suite
    from dsd_fast.bench.compare import Comparison
    from dsd_fast.bench.records import Record


def bench(
    suite: Annotated[str, typer.Argument(help="Which suite; match is the first.", show_default=False)],
    only: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Cases whose name fits, e.g. headline or 'rows/*'.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Records to compare with; a regression is an error.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records, and the comparison, as JSON.")] = False,
    results: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the records.")] = RESULTS,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed runs of each side; each case's own if none.")
    ] = None,
    device: options.Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice if none.")] = None,
    short: Annotated[bool, typer.Option("--short", help="Leave long cases out.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out what has a record of this commit and device in DIR.")
    ] = False,
) -> None:
    """Measure a suite's cases and append records to DIR/SUITE.jsonl.

    Each case is checked against its oracle, then timed in turn with its baseline. A case whose result is wrong gives a
    record that says so instead of figures, and the others still run. With --compare a case is a regression when its
    speed relative to its baseline is worse than in FILE beyond the noise of both. Cases that are not meant for the
    device, or lack a package, are left out, and named.

    Exit code: 0 when all is well, 1 after a wrong result or a regression, 2 when nothing could be run, 130 after
    Ctrl-C, which keeps the records made so far.
    """
    with one_sentence():
        from dsd_fast.bench.case import UnavailableError
        from dsd_fast.bench.records import load
        from dsd_fast.bench.suites import SUITES

        if suite not in SUITES:
            raise CommandError(f"suite {suite!r} is unknown; there are {', '.join(sorted(SUITES))}")
        old = None if compare is None else load(compare)
        options.quiet_transformers()
        try:
            chosen = SUITES[suite]()
        except UnavailableError as reason:
            raise CommandError(f"suite {suite!r}: {reason}") from reason
        records = _run(chosen, only, results / f"{suite}.jsonl", repeats, device, threads, short, resume)
        comparisons = None
        if old is not None:
            from dsd_fast.bench.compare import compare as comparison

            comparisons = comparison(old, records)
    if as_json:
        content: dict[str, Any] = {"records": records}
        if comparisons is not None:
            content["comparisons"] = [vars(each) for each in comparisons]
        typer.echo(json.dumps(content, indent=2, allow_nan=False))
    else:
        _show(records, comparisons, results / f"{suite}.jsonl")
    worse = any(each.state == "worse" for each in comparisons or ())
    raise typer.Exit(EXIT_ERRORS if worse or not all(record["ok"] for record in records) else 0)


def bench_docs(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; name the files that are not what the records say.")
    ] = False,
    root: Annotated[Path, typer.Option(metavar="DIR", help="The repository's root.")] = Path("."),
) -> None:
    """Make tables, CSV files and plots from the records in benchmarks/results.

    Markdown tables stand in README.md and docs/*.md between <!-- bench:SUITE/GROUP --> and
    <!-- /bench:SUITE/GROUP -->, plots in docs/figures.

    Exit code: 0; with --check 1 if a file is stale; 2 when a record or a marker is wrong.
    """
    with one_sentence():
        from dsd_fast.bench.case import UnavailableError
        from dsd_fast.bench.documents import update
        from dsd_fast.bench.suites import SUITES

        if not (root / RESULTS.parent).is_dir():
            raise CommandError(f"--root {root}: it has no folder {RESULTS.parent}: documents are made in a checkout")
        options.quiet_transformers()
        try:
            stale = update(root, SUITES, check)
        except (ImportError, UnavailableError) as error:
            raise CommandError(str(error)) from error
    for file in stale:
        typer.echo(f"{'stale' if check else 'written'}: {file}")
    raise typer.Exit(EXIT_ERRORS if check and stale else 0)


def _run(
    suite: Suite,
    only: str | None,
    path: Path,
    repeats: int | None,
    device: str,
    threads: int | None,
    short: bool,
    resume: bool,
) -> list[Record]:
    import torch
    from rich.console import Console

    from dsd_fast.bench import session
    from dsd_fast.bench.case import Context
    from dsd_fast.bench.records import load
    from dsd_fast.bench.run import Runner
    from dsd_fast.models.load import resolve_device

    resolve_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    options.exact_products()
    console = Console(stderr=True)
    done = session.finished(load(path), device) if resume and path.exists() else ()
    selection = session.select(suite, device, only=only, short=short, done=done)
    if not selection.cases and not selection.left_out:
        names = ", ".join(case.name for case in suite.cases)
        raise CommandError(f"--only {only!r} fits no case of {suite.name}: {names}")
    for name, reason in selection.left_out.items():
        _say(console, f"{name}: left out, {reason}", "dim")
    runner = Runner(suite, Context(device), repeats=repeats)
    return session.run(
        runner, selection.cases, path, lambda text, wrong: _say(console, text, "red" if wrong else "dim")
    )


def _say(console: Console, text: str, style: str) -> None:
    console.print(printable(" ".join(text.split())), style=style, markup=False, highlight=False, soft_wrap=True)


def _show(records: Sequence[Record], comparisons: Sequence[Comparison] | None, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dsd_fast.bench.tables import rich_tables

    console = Console()
    for table in rich_tables(records):
        console.print(table)
    refused = [record for record in records if not record["ok"]]
    if refused:
        table = Table("refused", "why")
        for record in refused:
            table.add_row(Text(record["name"]), Text(printable(record["reason"])))
        console.print(table)
    if comparisons is not None:
        table = Table("what", "is", "because", title="compared with the old records")
        for each in comparisons:
            table.add_row(Text(each.name), each.state, Text(each.text))
        console.print(table)
    console.print(Text(printable(f"{counted(len(records), 'record')} appended to {path}")), soft_wrap=True)
