"""``dsd-fast evaluate``: how often the right candidate of each group of a data set wins."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsd_fast.cli import data_options, options
from dsd_fast.cli.data_options import DATA_PANEL
from dsd_fast.cli.options import MODEL_PANEL, SCORE_PANEL
from dsd_fast.cli.terminal import (
    EXIT_ERRORS,
    EXIT_INTERRUPTED,
    CommandError,
    counted,
    one_sentence,
    printable,
)

if TYPE_CHECKING:
    from dsd_fast.matching import Matcher

CONVENTION_PANEL = "Conventions"

# Categories, and errors, that the terminal shows; the files have all.
_SHOWN = 20
_LABELS = {
    "accuracy": "accuracy (R@1)",
    "median_rank": "median rank",
    "mean_reciprocal_rank": "mean reciprocal rank",
    "text": "text score",
    "image": "image score",
    "group": "group score",
}


def evaluate(
    context: typer.Context,
    data: data_options.Data,
    out: Annotated[Path, typer.Option(help="Folder of the results.", show_default=False)],
    format: data_options.Format = None,
    images: data_options.Images = None,
    image_name: data_options.ImageName = None,
    negatives_seed: data_options.NegativesSeed = 0,
    official_split: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA_PANEL, metavar="train|evaluation", help="The official few-shot part, or the rest."
        ),
    ] = None,
    limit: data_options.Limit = None,
    batch_mean: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=CONVENTION_PANEL,
            min=1,
            metavar="B",
            help="Share the attention term in batches, as the official code does; wrong, but what was published.",
        ),
    ] = None,
    ties: Annotated[
        str,
        typer.Option(
            rich_help_panel=CONVENTION_PANEL, metavar="wrong|right", help="What a tie counts; officially right."
        ),
    ] = "wrong",
    parts: Annotated[
        bool, typer.Option("--parts", help="The attention and the noise-prediction part apart, too.")
    ] = False,
    matcher: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=MODEL_PANEL, metavar="DIR", help="A fitted matcher, which brings its own score settings."
        ),
    ] = None,
    model: options.ModelName = "mini",
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    variant: options.Variant = None,
    local_files_only: options.Offline = False,
    adapter: options.Adapter = None,
    adapter_file: options.AdapterFile = None,
    timesteps: options.Timesteps = "10",
    draws: options.Draws = 1,
    seed: options.NoiseSeed = 0,
    attention_weight: options.AttentionWeight = 0.5,
    noise_weight: options.NoiseWeight = 1.0,
    layer: options.Layer = None,
    tokens: options.Tokens = "all",
    pool: options.Pool = "mean",
    official: options.Official = False,
    image_size: options.ImageSize = None,
    runtime: options.Runtime = None,
    memory_budget: options.MemoryBudget = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap intervals.")] = 1000,
) -> None:
    """Count how often the right candidate of each group of a data set scores highest.

    Writes results.json (figures with 95 % intervals, overall and by category) and groups.parquet (the scores and the
    rank of each group) into --out. Each pair is scored by itself and a tie is a mistake, unless --batch-mean and --ties
    ask for the official code's conventions. A group with an image that cannot be used becomes an error row and counts
    in no figure, and the run goes on.

    Exit code: 0 when every group was scored, 1 when some were not, or have scores that are no finite numbers, 2 when
    nothing could be done, 130 after Ctrl-C, which keeps what has been scored.
    """
    with one_sentence():
        if matcher is not None:
            _refuse_settings(context)
        scoring = options.match_settings(
            timesteps=timesteps,
            draws=draws,
            seed=seed,
            attention_weight=attention_weight,
            noise_weight=noise_weight,
            layer=layer,
            tokens=tokens,
            pool=pool,
            official=official,
            image_size=image_size,
            memory_budget=memory_budget,
        )
        from dsd_fast.cli.evaluate_run import run
        from dsd_fast.matching import MatchConfig, Matcher

        config = MatchConfig(**scoring)
        groups = data_options.read_data(data, format, images, image_name, negatives_seed, official_split, limit)
        load_model = partial(
            options.load_model,
            model,
            device=device,
            dtype=dtype,
            revision=revision,
            variant=variant,
            local_files_only=local_files_only,
            adapter=adapter,
            adapter_file=adapter_file,
        )

        def load() -> Matcher:
            if matcher is None:
                made = Matcher(load_model(), config)
            else:
                made = Matcher.load(matcher, load_model(), memory_budget=config.memory_budget)
            return made if runtime is None else made.compile(runtime)

        settings = {
            "data": str(data),
            "format": format,
            "images": None if images is None else str(images),
            "image_name": image_name,
            "negatives_seed": negatives_seed,
            "official_split": official_split,
            "limit": limit,
            "matcher": None if matcher is None else str(matcher),
            "adapter": adapter,
            "runtime": runtime,
        }
        summary = run(load, groups, out, settings, batch_mean=batch_mean, ties=ties, parts=parts, resamples=resamples)
    _show(summary, out)
    if not summary["complete"]:
        raise typer.Exit(EXIT_INTERRUPTED)
    counts = summary["counts"]
    raise typer.Exit(EXIT_ERRORS if counts["errors"] or counts["not_finite"] else 0)


def _refuse_settings(context: typer.Context) -> None:
    """A fitted matcher has the settings that it was fitted with."""
    own = [
        parameter.opts[0]
        for parameter in context.command.params
        if getattr(parameter, "rich_help_panel", None) == SCORE_PANEL
        and (source := context.get_parameter_source(parameter.name or ""))
        and source.name == "COMMANDLINE"
    ]
    if own:
        raise CommandError(f"--matcher brings its own settings, so leave out {', '.join(own)}")


def _show(summary: dict[str, Any], out: Path) -> None:
    """The figures, overall, by part and by category, the first errors, and the counts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if summary["figures"]:
        table = Table("groups", "figure", "value", "95 % interval", "n", "chance")
        for column in table.columns[2:]:
            column.justify = "right"
        sections = {"all": summary["figures"]}
        sections |= {f"{part} part alone": found["figures"] for part, found in summary["parts"].items()}
        categories = list(summary["by_category"].items())
        sections |= {f"category {name or '(none)'}": figures for name, figures in categories[:_SHOWN]}
        for section, figures in sections.items():
            for place, (name, figure) in enumerate((n, f) for n, f in figures.items() if n != "R@1"):
                table.add_row(Text(printable(section)) if place == 0 else "", *_cells(name, figure))
            table.add_section()
        console.print(table)
        if len(categories) > _SHOWN:
            console.print(f"and {len(categories) - _SHOWN:,} more categories in results.json")
    errors = summary["errors"]
    if errors:
        table = Table("group", "reason", "what", title="not scored")
        table.columns[2].overflow = "fold"
        for entry in errors[:_SHOWN]:
            table.add_row(Text(printable(entry["id"])), entry["reason"], Text(printable(entry["message"])))
        console.print(table)
    if len(errors) > _SHOWN:
        console.print(f"and {counted(len(errors) - _SHOWN, 'more error')} in results.json")
    counts, pairs, seconds = summary["counts"], summary["pairs"], summary["seconds"]
    line = f"{counted(counts['groups'], 'group')}: {counts['scored']:,} scored, {counted(counts['errors'], 'error')}"
    if counts["not_finite"]:
        line += f", {counts['not_finite']:,} with scores that are no finite numbers, which --dtype float32 may avoid"
    if not summary["complete"]:
        line += f", {counts['not_reached']:,} not reached before the interruption"
    line += f". {counted(pairs, 'pair')} in {seconds:.1f} s ({pairs / max(seconds, 1e-9):.1f} pairs/s). Results: {out}"
    console.print(Text(printable(line)), soft_wrap=True)


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
