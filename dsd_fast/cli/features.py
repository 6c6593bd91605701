"""``dsd-fast features``: what the network makes of images, as files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dsd_fast.cli import features_options, options
from dsd_fast.cli.features_options import FEATURE_PANEL
from dsd_fast.cli.terminal import EXIT_ERRORS, EXIT_INTERRUPTED, CommandError, counted, one_sentence, printable

OUTPUT_PANEL = "Files"

# Errors that the terminal shows; the index has all.
_SHOWN = 20


def features(
    images: features_options.Images,
    out: Annotated[Path, typer.Option(help="Folder of the results, this job's alone.", show_default=False)],
    layers: features_options.Layers = None,
    timesteps: features_options.Timesteps = "50",
    prompt: features_options.Prompt = "",
    prompts: features_options.Prompts = None,
    attention: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=FEATURE_PANEL,
            metavar="PLACE,…",
            help='Attention maps too, as the feature "attn": up_cross, down_self, ….',
        ),
    ] = None,
    official_timesteps: Annotated[
        bool,
        typer.Option(
            "--official-timesteps",
            rich_help_panel=FEATURE_PANEL,
            help="The timesteps that the official code uses when asked for these.",
        ),
    ] = False,
    draws: features_options.Draws = 1,
    keep_draws: Annotated[
        bool, typer.Option("--keep-draws", rich_help_panel=FEATURE_PANEL, help="Keep the draws apart.")
    ] = False,
    seed: features_options.Seed = 0,
    image_size: features_options.ImageSize = None,
    resize: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=FEATURE_PANEL,
            metavar="N|HxW",
            help="Maps N times smaller, by mean; or all of one size, bilinear.",
        ),
    ] = None,
    pool: Annotated[
        str | None, typer.Option(rich_help_panel=FEATURE_PANEL, metavar="mean|max", help="Over all positions.")
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", rich_help_panel=FEATURE_PANEL, help="Norm 1 over channels.")
    ] = False,
    pca: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=FEATURE_PANEL,
            metavar="K",
            help="The K principal components of each layer, fitted to the first --pca-images.",
        ),
    ] = None,
    pca_images: Annotated[
        int, typer.Option(min=1, rich_help_panel=FEATURE_PANEL, help="That --pca is fitted to.")
    ] = 64,
    feature_dtype: Annotated[
        str | None,
        typer.Option(rich_help_panel=FEATURE_PANEL, help="Of the files: float32, float16, bfloat16; --dtype if none."),
    ] = None,
    control: features_options.Control = None,
    control_scale: features_options.ControlScale = None,
    denoise_from: features_options.DenoiseFrom = None,
    denoise_steps: features_options.DenoiseSteps = None,
    inversion: features_options.Inversion = False,
    layout: Annotated[
        str,
        typer.Option(
            rich_help_panel=OUTPUT_PANEL,
            metavar="NAME",
            help="shards (safetensors), or the official files: npy-layer, npy-sample, npy-aggregated.",
        ),
    ] = "shards",
    shard_rows: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=OUTPUT_PANEL, help="Images per shard; as many as make 64 MiB if none."),
    ] = None,
    pictures: Annotated[
        int,
        typer.Option(
            min=0,
            rich_help_panel=OUTPUT_PANEL,
            metavar="K",
            help="Pictures of the principal components for the first K images; makes the report too.",
        ),
    ] = 0,
    report: Annotated[
        bool, typer.Option("--report", rich_help_panel=OUTPUT_PANEL, help="Write report.html, a page to look at.")
    ] = False,
    retry_errors: Annotated[
        bool,
        typer.Option("--retry-errors", rich_help_panel=OUTPUT_PANEL, help="Try images again that could not be used."),
    ] = False,
    worker: Annotated[
        int, typer.Option(min=0, rich_help_panel=OUTPUT_PANEL, help="Which of --workers this is, from 0.")
    ] = 0,
    workers: Annotated[
        int,
        typer.Option(min=1, rich_help_panel=OUTPUT_PANEL, help="Processes that share the job; you start each."),
    ] = 1,
    model: options.ModelName = "mini",
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    variant: options.Variant = None,
    local_files_only: options.Offline = False,
    adapter: options.Adapter = None,
    adapter_file: options.AdapterFile = None,
    runtime: options.Runtime = None,
    memory_budget: options.MemoryBudget = None,
) -> None:
    """Extract a diffusion model's activations for images, at any timesteps and layers.

    Writes shards of safetensors and a Parquet index into --out. A run that was killed goes on when the same command is
    given again, and the files are the same in the end; other settings for the same folder are refused. An image that
    cannot be used becomes an error row.

    Exit code: 0 when every image has its features, 1 when some could not be used, 2 when nothing could be done or the
    disk is full, 130 after Ctrl-C.
    """
    with one_sentence():
        if prompt and prompts is not None:
            raise CommandError("give either --prompt TEXT or --prompts FILE")
        if worker >= workers:
            raise CommandError(f"--worker: got {worker}, expected below --workers, {workers}")
        settings = {
            "layers": features_options.parse_layers(layers),
            "timesteps": features_options.parse_timesteps(timesteps),
            "attention": features_options.parse_items(attention),
            "official_timesteps": official_timesteps,
            "draws": draws,
            "keep_draws": keep_draws,
            "image_size": None if image_size is None else options.parse_image_size(image_size),
            "resize": None if resize is None else features_options.parse_resize(resize),
            "pool": pool,
            "normalize": normalize,
            "dtype": feature_dtype,
            "memory_budget": None if memory_budget is None else options.parse_bytes(memory_budget),
        }
        from dsd_fast.cli.features_run import Request, run

        load = partial(
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
        controls = partial(
            features_options.load_controls, control, control_scale, dtype=dtype, local_files_only=local_files_only
        )
        technique = {"denoise_from": denoise_from, "denoise_steps": denoise_steps, "inversion": inversion}
        request = Request(
            images=images,
            prompt=prompt,
            prompts=prompts,
            seed=seed,
            components=pca,
            pca_images=pca_images,
            pictures=pictures,
            report=report,
            runtime=runtime,
            job={
                "layout": layout,
                "shard_rows": shard_rows,
                "retry_errors": retry_errors,
                "worker": worker,
                "workers": workers,
            },
        )
        summary = run(load, controls, settings, technique, request, out)
    _show(summary, out)
    if not summary["complete"]:
        raise typer.Exit(EXIT_INTERRUPTED)
    raise typer.Exit(EXIT_ERRORS if summary["counts"]["errors"] + summary["counts"]["done_errors"] else 0)


def _show(summary: dict[str, Any], out: Path) -> None:
    """The first errors, the counts, and how well writing was hidden behind computing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, counts = Console(), summary["counts"]
    if summary["errors"]:
        table = Table("reason", "what", title="no features")
        table.columns[1].overflow = "fold"
        for error in summary["errors"][:_SHOWN]:
            table.add_row(error["reason"], Text(printable(error["message"])))
        console.print(table)
    errors = counts["errors"] + counts["done_errors"]
    if errors > _SHOWN:
        console.print(f"and {counted(errors - _SHOWN, 'more error')} in the index")
    line = f"{counted(counts['inputs'], 'image')}: {counts['ok']:,} done now"
    line += f", {counts['done'] - counts['done_errors']:,} before, {counted(errors, 'error')}"
    if counts["duplicates"]:
        line += f", {counted(counts['duplicates'], 'duplicate')}"
    if not summary["complete"]:
        line += f", {counts['not_reached']:,} not reached before the interruption"
    seconds = summary["seconds"]
    line += f". {counts['ok'] / max(seconds, 1e-9):.1f} images/s in {seconds:.1f} s"
    if counts["ok"]:
        line += f", {summary['overlap']:.0%} of the writing while computing"
    if counts["elsewhere"]:
        line += f". {counted(counts['elsewhere'], 'image')} of other workers"
    console.print(Text(printable(f"{line}. Results: {out}")), soft_wrap=True)
