"""``dsd-fast gate``: which techniques keep features true to the images."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dsd_fast.cli import features_options, options
from dsd_fast.cli.features_options import TECHNIQUE_PANEL
from dsd_fast.cli.terminal import EXIT_ERRORS, CommandError, counted, one_sentence, printable

GUIDE_PANEL = "Guide"

# Errors that the terminal shows.
_SHOWN = 20


def gate(
    images: features_options.Images,
    out: Annotated[Path, typer.Option(help="Folder of the results.", show_default=False)],
    prompt: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=TECHNIQUE_PANEL, help="A fine-grained prompt that fits all images.", metavar="TEXT"
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=TECHNIQUE_PANEL,
            metavar="FILE",
            help="Fine-grained prompts: .jsonl, .csv or .parquet with the columns image and prompt.",
        ),
    ] = None,
    captioner: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=TECHNIQUE_PANEL,
            metavar="NAME",
            help="An image-captioning model that writes the prompts: a folder or a hub id.",
        ),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=TECHNIQUE_PANEL,
            metavar="TEXT",
            help="Words after each caption; the official ones if none, which some models are too short for.",
        ),
    ] = None,
    control: features_options.Control = None,
    control_scale: features_options.ControlScale = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=TECHNIQUE_PANEL,
            metavar="[NAME=]FILE",
            help='A LoRA: a .safetensors file, folder, hub id, or "mini"; repeat for more, each by itself.',
        ),
    ] = None,
    denoise_from: features_options.DenoiseFrom = None,
    denoise_steps: features_options.DenoiseSteps = None,
    inversion: features_options.Inversion = False,
    layers: features_options.Layers = None,
    timesteps: features_options.Timesteps = "50",
    draws: features_options.Draws = 1,
    seed: features_options.Seed = 0,
    image_size: features_options.ImageSize = None,
    normalize: Annotated[
        bool,
        typer.Option(
            "--normalize",
            rich_help_panel=features_options.FEATURE_PANEL,
            help="Compare directions: norm 1 over channels before the measure.",
        ),
    ] = False,
    anchor_timestep: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=features_options.FEATURE_PANEL,
            metavar="T",
            help="Of the anchor, the feature of strong shift; 4/5 of the schedule if none.",
        ),
    ] = None,
    guide: Annotated[
        bool, typer.Option("--guide/--no-guide", rich_help_panel=GUIDE_PANEL, help="Run img2img, or the measure alone.")
    ] = True,
    strength: Annotated[
        float, typer.Option(rich_help_panel=GUIDE_PANEL, help="Of img2img, above 0 and at most 1.")
    ] = 0.8,
    steps: Annotated[int, typer.Option(min=1, rich_help_panel=GUIDE_PANEL, help="Over the whole schedule.")] = 20,
    guidance: Annotated[
        float, typer.Option(rich_help_panel=GUIDE_PANEL, help="Classifier-free guidance; 1 is none, as of features.")
    ] = 1.0,
    shown: Annotated[int, typer.Option(min=1, rich_help_panel=GUIDE_PANEL, help="Images on the contact sheet.")] = 8,
    model: options.ModelName = "mini",
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    variant: options.Variant = None,
    local_files_only: options.Offline = False,
    memory_budget: options.MemoryBudget = None,
) -> None:
    """Measure which techniques keep features true to the images: prompts, ControlNets, LoRAs, and all together.

    Each technique by itself and their combination are compared with the empty prompt and nothing else. The content
    shift of features says how much is lost to the noise; img2img shows whether pictures come closer to the image.

    Writes gate.json, ranking.csv, scores.parquet, scores.png, distances.parquet, contact-sheet.png and report.html into
    --out. What an earlier run has left there is replaced.

    Exit code: 0 when every image was used, 1 when some could not be, 2 when nothing could be done, 130 after Ctrl-C.
    """
    with one_sentence():
        if sum(given is not None for given in (prompt, prompts, captioner)) > 1:
            raise CommandError("give one of --prompt TEXT, --prompts FILE and --captioner NAME")
        settings = {
            "layers": features_options.parse_layers(layers),
            "timesteps": features_options.parse_timesteps(timesteps),
            "draws": draws,
            "image_size": None if image_size is None else options.parse_image_size(image_size),
            "memory_budget": None if memory_budget is None else options.parse_bytes(memory_budget),
        }
        from dsd_fast.cli.gate_run import Parts, run

        load = partial(
            options.load_model,
            model,
            device=device,
            dtype=dtype,
            revision=revision,
            variant=variant,
            local_files_only=local_files_only,
        )
        parts = Parts(
            prompt=prompt,
            prompts=prompts,
            captioner=captioner,
            quality=quality,
            adapters=tuple(adapter or ()),
            denoise_from=denoise_from,
            denoise_steps=denoise_steps,
            inversion=inversion,
            local_files_only=local_files_only,
        )
        controls = partial(
            features_options.load_controls, control, control_scale, dtype=dtype, local_files_only=local_files_only
        )
        asked = {
            "seed": seed,
            "normalize": normalize,
            "anchor_timestep": anchor_timestep,
            "guide": guide,
            "strength": strength,
            "steps": steps,
            "guidance": guidance,
            "shown": shown,
        }
        summary = run(load, controls, settings, parts, asked, images, out)
    _show(summary, out)
    raise typer.Exit(EXIT_ERRORS if summary["errors"] else 0)


def _show(summary: dict[str, Any], out: Path) -> None:
    """The ranked table, the first errors, and what to take."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(summary["result"].table())
    if summary["errors"]:
        table = Table("reason", "what", title="not used")
        table.columns[1].overflow = "fold"
        for _, reason, message in summary["errors"][:_SHOWN]:
            table.add_row(reason, Text(printable(message)))
        console.print(table)
    used, errors = summary["images"], len(summary["errors"])
    line = (
        f"{counted(used + errors, 'image')}: {used:,} used, {counted(errors, 'error')}, in {summary['seconds']:.1f} s. "
    )
    line += f"{summary['verdict']} Results: {out}"
    console.print(Text(printable(line)), soft_wrap=True)
