"""``dsd-fast features``: what the network makes of images, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from dsd_fast.cli.features.options import FeaturesRequest
from dsd_fast.cli.groups import command
from dsd_fast.cli.terminal import CommandError, end, show_errors, show_outcome


@command
def features(request: FeaturesRequest) -> None:
    """Extract a diffusion model's activations for images, at any timesteps and layers.

    Writes shards of safetensors and a Parquet index into --out. A run that was killed goes on when the same command is
    given again, and the files are the same in the end; other settings for the same folder are refused. An image that
    cannot be used becomes an error row.

    Exit code: 0 when every image has its features, 1 when some could not be used, 2 when nothing could be done or the
    disk is full, 130 after Ctrl-C.
    """
    chosen = request.features
    if chosen.prompt and chosen.prompts is not None:
        raise CommandError("give either --prompt TEXT or --prompts FILE")
    request.workers.check(request.source.device)
    settings = chosen.settings(request.memory)
    from dsd_fast.cli.features.run import run

    summary = run(request, settings)
    _show(summary, request.out)
    end(summary["complete"], summary["counts"]["errors"] + summary["counts"]["done_errors"])


def _show(summary: dict[str, Any], out: Path) -> None:
    """Prints the first errors, the counts, and how well writing was hidden behind computing."""
    console, counts = Console(), summary["counts"]
    errors = counts["errors"] + counts["done_errors"]
    rows = [(error["reason"], error["message"]) for error in summary["errors"]]
    show_errors(console, "no features", rows, errors, "the index")
    show_outcome(console, summary, "done", f"{summary['overlap']:.0%} of the writing while computing", out)
