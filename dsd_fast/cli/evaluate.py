"""``dsd-fast evaluate``: how often the right candidate of each group of a data set wins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsd_fast.cli import options
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
    from dsd_fast.matching import Group, Matcher

DATA_PANEL = "Data"
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
    data: Annotated[Path, typer.Argument(help="A data file, or the folder of RefCOCOg.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the results.", show_default=False)],
    format: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA_PANEL,
            metavar="NAME",
            help="comvg, vqa, vqa-binary, refcocog, winoground, jsonl, csv or parquet; told by the file if none.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(rich_help_panel=DATA_PANEL, metavar="DIR", help="Folder of the images; the data file's if none."),
    ] = None,
    image_name: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA_PANEL, metavar="TEMPLATE", help="Image file names from ids; the format's own if none."
        ),
    ] = None,
    negatives_seed: Annotated[
        int, typer.Option(rich_help_panel=DATA_PANEL, help="Of the negatives, where the format draws them.")
    ] = 0,
    official_split: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA_PANEL, metavar="train|evaluation", help="The official few-shot part, or the rest."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(rich_help_panel=DATA_PANEL, min=1, help="The first groups alone.")
    ] = None,
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
    model: Annotated[
        str, typer.Option(rich_help_panel=MODEL_PANEL, help='"mini", a hub id, or a diffusers folder.')
    ] = "mini",
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    variant: options.Variant = None,
    local_files_only: options.Offline = False,
    adapter: Annotated[
        str | None, typer.Option(rich_help_panel=MODEL_PANEL, help="A LoRA: a .safetensors file, folder or hub id.")
    ] = None,
    adapter_file: Annotated[
        str | None, typer.Option(rich_help_panel=MODEL_PANEL, help="Which file, where --adapter has several.")
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=SCORE_PANEL,
            metavar="N|T,T,…",
            help="How many, on the official grid; or which, separated by commas. 10 if none.",
        ),
    ] = None,
    draws: Annotated[
        int | None, typer.Option(rich_help_panel=SCORE_PANEL, help="Noise draws per timestep; 1 if none.")
    ] = None,
    seed: Annotated[int | None, typer.Option(rich_help_panel=SCORE_PANEL, help="Of the noise; 0 if none.")] = None,
    attention_weight: Annotated[
        float | None, typer.Option(rich_help_panel=SCORE_PANEL, help="Of the cross-attention term; 0.5 if none.")
    ] = None,
    noise_weight: Annotated[
        float | None, typer.Option(rich_help_panel=SCORE_PANEL, help="Of the noise-prediction term; 1 if none.")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=SCORE_PANEL, help="A score id to read; repeat for more. The official ones if not given."
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(rich_help_panel=SCORE_PANEL, metavar="all|real", help="Text tokens that are scored; all if none."),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=SCORE_PANEL,
            metavar="mean|max|τ",
            help="Pooling over positions; τ is a temperature. mean if none.",
        ),
    ] = None,
    official: Annotated[
        bool,
        typer.Option("--official", rich_help_panel=SCORE_PANEL, help="The official code's score to the last digit."),
    ] = False,
    image_size: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=SCORE_PANEL, metavar="H[xW]", help="Pixels to resize to; the model's own if none."
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=SCORE_PANEL, help="For activations and text keys, e.g. 512MB or 2GiB; the device's if none."
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="inductor|cudagraph",
            help="Compile the network, which takes minutes at first; for many images.",
        ),
    ] = None,
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
        given: dict[str, Any] = {
            "timesteps": None if timesteps is None else options.parse_timesteps(timesteps),
            "layers": tuple(layer) if layer else None,
            "attention_weight": attention_weight,
            "noise_weight": noise_weight,
            "draws": draws,
            "seed": seed,
            "tokens": tokens,
            "pool": None if pool is None else options.parse_pool(pool),
            "official": official or None,
            "image_size": None if image_size is None else options.parse_image_size(image_size),
            "memory_budget": None if memory_budget is None else options.parse_bytes(memory_budget),
        }
        given = {name: value for name, value in given.items() if value is not None}
        if matcher is not None:
            _refuse_settings(given, adapter)
        from dsd_fast.cli.evaluate_run import run
        from dsd_fast.matching import MatchConfig, Matcher

        config = MatchConfig(**given)
        groups = read_data(data, format, images, image_name, negatives_seed, official_split, limit)

        def load() -> Matcher:
            bundle = options.load_model(
                model,
                device=device,
                dtype=dtype,
                revision=revision,
                variant=variant,
                local_files_only=local_files_only,
            )
            if adapter is not None:
                bundle.load_lora(adapter, "adapter", adapter_file)
            made = Matcher(bundle, config) if matcher is None else Matcher.load(matcher, bundle)
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


def _refuse_settings(given: Mapping[str, Any], adapter: str | None) -> None:
    names = {"layers": "layer"}
    extra = [f"--{names.get(name, name).replace('_', '-')}" for name in given]
    extra += ["--adapter"] if adapter is not None else []
    if extra:
        raise CommandError(f"--matcher brings its own settings, so leave out {', '.join(extra)}")


def read_data(
    data: Path,
    format: str | None,
    images: Path | None,
    image_name: str | None,
    negatives_seed: int,
    split: str | None,
    limit: int | None,
) -> list[Group]:
    """The groups that a command's options ask for.

    Raises:
        CommandError: a part of a data set that has no name.
        ValueError: as :func:`dsd_fast.read_groups` and :func:`dsd_fast.matching.official_split`.
    """
    from dsd_fast.matching.datasets import official_split, read_groups

    if split is not None and format is None:
        raise CommandError("--official-split depends on the data set: give --format too")
    # A part is one of all groups, whatever the limit.
    first = limit if split is None else None
    groups = read_groups(data, format, images=images, image_name=image_name, seed=negatives_seed, limit=first)
    if split is not None:
        assert format is not None
        groups = official_split(groups, format, split)
    return groups[:limit]


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
