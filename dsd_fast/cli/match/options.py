"""Options of ``dsd-fast match``."""

from pathlib import Path
from typing import Annotated

import typer

from dsd_fast.cli import feature_options as shared
from dsd_fast.cli.groups import Options
from dsd_fast.cli.options import AdaptedModelOptions, MemoryOptions, ScoreOptions, WorkerOptions


class FileOptions(Options, panel="Files"):
    """How the rows are written."""

    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Images whose rows are written together; 256, or fewer of many captions.")
    ] = None
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Try images again that could not be used.")] = (
        False
    )


class MatchRequest(Options):
    """Images, captions, and what is written about them."""

    images: shared.Images
    out: Annotated[Path, typer.Option(help="Folder of the results, this job's alone.", show_default=False)]
    captions: Annotated[
        Path | None, typer.Option(help="UTF-8 text file, one caption per line; blank lines are skipped.")
    ] = None
    caption: Annotated[list[str] | None, typer.Option(help="A caption; repeat for more.")] = None
    top_k: Annotated[int, typer.Option(min=1, help="Captions per image in the table and in results.json.")] = 5
    heatmaps: Annotated[
        int,
        typer.Option(
            min=0, metavar="K", help="Heat maps of the words of each image's K best captions; makes the report too."
        ),
    ] = 0
    report: Annotated[bool, typer.Option("--report", help="Write report.html, a page to look at.")] = False
    source: AdaptedModelOptions
    files: FileOptions
    workers: WorkerOptions
    score: ScoreOptions
    memory: MemoryOptions
