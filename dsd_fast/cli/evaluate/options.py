"""Options of ``dsd-fast evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from dsd_fast.cli.data import DataOptions
from dsd_fast.cli.groups import Options
from dsd_fast.cli.options import MODEL_PANEL, AdaptedModelOptions, MemoryOptions, ScoreOptions

_CONVENTION_PANEL = "Conventions"


class EvaluationData(DataOptions):
    """A data set, whole or a part of it."""

    official_split: Annotated[
        str | None, typer.Option(metavar="train|evaluation", help="The official few-shot part, or the rest.")
    ] = None


class Conventions(Options):
    """What is counted, under the names of the arguments of :func:`dsd_fast.matching.evaluation.evaluate`."""

    batch_mean: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_CONVENTION_PANEL,
            min=1,
            metavar="B",
            help="Share the attention term in batches, as the official code does; wrong, but what was published.",
        ),
    ] = None
    ties: Annotated[
        str,
        typer.Option(
            rich_help_panel=_CONVENTION_PANEL, metavar="wrong|right", help="What a tie counts; officially right."
        ),
    ] = "wrong"
    parts: Annotated[
        bool,
        typer.Option("--parts", help="The attention and the noise-prediction part apart, too."),
    ] = False
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap intervals.")] = 1000


class EvaluateRequest(Options):
    """A data set, a score, and what is counted."""

    context: typer.Context
    data: EvaluationData
    out: Annotated[Path, typer.Option(help="Folder of the results.", show_default=False)]
    conventions: Conventions
    matcher: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=MODEL_PANEL, metavar="DIR", help="A fitted matcher, which brings its own score settings."
        ),
    ] = None
    source: AdaptedModelOptions
    score: ScoreOptions
    memory: MemoryOptions
