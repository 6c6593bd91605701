"""Options of ``dsd-fast features``."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from dsd_fast.cli import feature_options as shared
from dsd_fast.cli.groups import Options
from dsd_fast.cli.options import AdaptedModelOptions, MemoryOptions, WorkerOptions, parse_bytes


def parse_resize(text: str | None) -> int | tuple[int, int] | None:
    """Reads a factor, or height and width: 4, 16x16; None stays None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None:
        raise ValueError(f"--resize: {text!r} is no factor and no size, expected for instance 4 or 16x16")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


class FeatureOptions(Options, panel=shared.FEATURE_PANEL):
    """What is extracted."""

    layers: shared.Layers = None
    timesteps: shared.Timesteps = "50"
    prompt: Annotated[str, typer.Option(help="One prompt for all images.")] = ""
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A prompt for each image: .jsonl, .csv or .parquet with the columns image and prompt.",
        ),
    ] = None
    attention: Annotated[
        list[str] | None,
        typer.Option(metavar="PLACE,…", help='Attention maps too, as the feature "attn": up_cross, down_self, ….'),
        shared.parse_items,
    ] = None
    official_timesteps: Annotated[
        bool,
        typer.Option("--official-timesteps", help="The timesteps that the official code uses when asked for these."),
    ] = False
    draws: shared.Draws = 1
    keep_draws: Annotated[bool, typer.Option("--keep-draws", help="Keep the draws apart.")] = False
    seed: shared.Seed = 0
    image_size: shared.ImageSize = None
    resize: Annotated[
        str | None,
        typer.Option(metavar="N|HxW", help="Maps N times smaller, by mean; or all of one size, bilinear."),
        parse_resize,
    ] = None
    pool: Annotated[str | None, typer.Option(metavar="mean|max", help="Over all positions.")] = None
    normalize: Annotated[bool, typer.Option("--normalize", help="Norm 1 over channels.")] = False
    pca: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="The K principal components of each layer, fitted to the first --pca-images.",
        ),
    ] = None
    pca_images: Annotated[int, typer.Option(min=1, help="That --pca is fitted to.")] = 64
    feature_dtype: Annotated[
        str | None, typer.Option(help="Of the files: float32, float16, bfloat16; --dtype if none.")
    ] = None

    def settings(self, memory: MemoryOptions) -> dict[str, Any]:
        """Makes the settings of a :class:`dsd_fast.features.FeatureConfig` that the options stand for.

        Raises:
            ValueError: text that is no value of its option, by name.
        """
        # Before torch is loaded for nothing.
        values = self.values() | {"dtype": self.feature_dtype, "memory_budget": parse_bytes(memory.memory_budget)}
        from dsd_fast.features import FeatureConfig

        return {field.name: values[field.name] for field in fields(FeatureConfig)}


class FileOptions(Options, panel="Files"):
    """How the features are written, and what is shown of them."""

    layout: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="shards (safetensors), or the official files: npy-layer, npy-sample, npy-aggregated.",
        ),
    ] = "shards"
    shard_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Images per shard; as many as make 64 MiB if none."),
    ] = None
    pictures: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="K",
            help="Pictures of the principal components for the first K images; makes the report too.",
        ),
    ] = 0
    report: Annotated[bool, typer.Option("--report", help="Write report.html, a page to look at.")] = False
    retry_errors: Annotated[
        bool,
        typer.Option("--retry-errors", help="Try images again that could not be used."),
    ] = False


class FeaturesRequest(Options):
    """Images, and what is made of them."""

    images: shared.Images
    out: Annotated[Path, typer.Option(help="Folder of the results, this job's alone.", show_default=False)]
    features: FeatureOptions
    controls: shared.ControlOptions
    latents: shared.LatentOptions
    files: FileOptions
    workers: WorkerOptions
    source: AdaptedModelOptions
    memory: MemoryOptions
