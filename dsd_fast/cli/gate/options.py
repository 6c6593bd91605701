"""Options of ``dsd-fast gate``."""

from pathlib import Path
from typing import Annotated

import typer

from dsd_fast.cli import feature_options as shared
from dsd_fast.cli.groups import Options
from dsd_fast.cli.options import MemoryBudget, ModelOptions


class PromptOptions(Options, panel=shared.TECHNIQUE_PANEL):
    """Prompts, from one of three places."""

    prompt: Annotated[
        str | None,
        typer.Option(help="A fine-grained prompt that fits all images.", metavar="TEXT"),
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Fine-grained prompts: .jsonl, .csv or .parquet with the columns image and prompt."
        ),
    ] = None
    captioner: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="An image-captioning model that writes the prompts: a folder or a hub id."),
    ] = None
    quality: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Words after each caption; the official ones if none, which some models are too short for.",
        ),
    ] = None


class TechniqueOptions(Options, panel=shared.TECHNIQUE_PANEL):
    """What techniques are made of."""

    prompts: PromptOptions
    controls: shared.ControlOptions
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help='A LoRA: a .safetensors file, folder, hub id, or "mini"; repeat for more, each by itself.',
        ),
    ] = None
    latents: shared.LatentOptions


class MeasureOptions(Options, panel=shared.FEATURE_PANEL):
    """Which features are compared, and how."""

    layers: shared.Layers = None
    timesteps: shared.Timesteps = "50"
    draws: shared.Draws = 1
    seed: shared.Seed = 0
    image_size: shared.ImageSize = None
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Compare directions: norm 1 over channels before the measure.")
    ] = False
    anchor_timestep: Annotated[
        int | None,
        typer.Option(metavar="T", help="Of the anchor, the feature of strong shift; 4/5 of the schedule if none."),
    ] = None


class GuideOptions(Options, panel="Guide"):
    """What img2img does, under the names of the arguments of :func:`dsd_fast.features.gate.gate`."""

    guide: Annotated[bool, typer.Option("--guide/--no-guide", help="Run img2img, or the measure alone.")] = True
    strength: Annotated[float, typer.Option(help="Of img2img, above 0 and at most 1.")] = 0.8
    steps: Annotated[int, typer.Option(min=1, help="Over the whole schedule.")] = 20
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none, as of features.")] = 1.0
    shown: Annotated[int, typer.Option(min=1, help="Images on the contact sheet.")] = 8


class GateRequest(Options):
    """Images, techniques, and how these are measured."""

    images: shared.Images
    out: Annotated[Path, typer.Option(help="Folder of the results.", show_default=False)]
    techniques: TechniqueOptions
    measure: MeasureOptions
    guide: GuideOptions
    source: ModelOptions
    memory_budget: MemoryBudget = None
