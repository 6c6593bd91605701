"""``dsd-fast generate``: images from texts, as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from dsd_fast.cli.generate.options import GenerateRequest
from dsd_fast.cli.groups import command
from dsd_fast.cli.terminal import EXIT_ERRORS, end, show_errors, show_line, show_outcome

if TYPE_CHECKING:
    from dsd_fast.generation.again import Again

# Characters of a prompt, which tell a row from others.
_SHOWN = 40


@command
def generate(request: GenerateRequest) -> None:
    """Make any number of images from texts, each of which can be made again from its row.

    Prompts come from the command line, from --prompts FILE, or from templates, classes and seeds. Writes shards of
    images and a Parquet index into --out. A run that was killed goes on when the same command is given again, and the
    files are the same in the end; other settings for the same folder are refused. A row that cannot be made becomes an
    error row. **No safety checker runs**: what the model makes is written as it is.

    With --row ID one image of the folder is made again, from its row in the index and the manifest alone, and compared
    with the file.

    Exit code: 0 when every row has its image (with --row, the same image), 1 when some have none, 2 when nothing could
    be done or the disk is full, 130 after Ctrl-C.
    """
    if request.row is not None:
        from dsd_fast.cli.generate.again import run_again

        _show_again(run_again(request, request.row))
        return
    from dsd_fast.cli.generate.run import run

    summary = run(request)
    _show(summary, request.out)
    end(summary["complete"], summary["counts"]["errors"] + summary["counts"]["done_errors"])


def _show_again(found: Again) -> None:
    row, console = found.row, Console()
    verdict = "the same" if found.same else "not the same"
    show_line(console, f"{row['id']}: {row['prompt']!r}, seed {row['seed']}")
    show_line(
        console, f"made again, it is {verdict}: levels differ by at most {found.largest}, {found.mean:.4f} in mean"
    )
    if not found.same:
        raise typer.Exit(EXIT_ERRORS)


def _show(summary: dict[str, Any], out: Path) -> None:
    """Prints the first errors, the counts, and how well encoding and writing were hidden behind computing."""
    console, counts = Console(), summary["counts"]
    errors = counts["errors"] + counts["done_errors"]
    rows = [
        (error["name"] or error["prompt"][:_SHOWN], error["reason"], error["message"]) for error in summary["errors"]
    ]
    show_errors(console, "no image", rows, errors, "the index", ("row", "reason", "what"))
    meanwhile = f"{summary['encoding']:.0%} of the encoding and {summary['writing']:.0%} of the writing meanwhile"
    show_outcome(console, summary, "made", meanwhile, out)
