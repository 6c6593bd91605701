"""Options of features that several commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dsd_fast.models import Model
    from dsd_fast.models.controlnet import Control as ControlNet

FEATURE_PANEL = "Features"
TECHNIQUE_PANEL = "Technique"

# The parts of a network that ids begin with; sets' names do not.
_PLACES = ("down-", "mid-", "up-", "unet-", "vae-")

Images = Annotated[
    list[Path],
    typer.Argument(help="Image files, and folders that are searched for JPEG, PNG and WebP files.", show_default=False),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=FEATURE_PANEL,
        metavar="NAME|ID,ID,…|FILE.json",
        help="A set by name (practical, legacy, all, …), layer ids, or an official JSON file; practical if none.",
    ),
]
Timesteps = Annotated[
    str, typer.Option(rich_help_panel=FEATURE_PANEL, metavar="T,T,…", help="Exactly these; 0 is the clean latent.")
]
Prompt = Annotated[str, typer.Option(rich_help_panel=FEATURE_PANEL, help="One prompt for all images.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=FEATURE_PANEL,
        metavar="FILE",
        help="A prompt for each image: .jsonl, .csv or .parquet with the columns image and prompt.",
    ),
]
Draws = Annotated[int, typer.Option(rich_help_panel=FEATURE_PANEL, help="Noise draws, averaged.")]
Seed = Annotated[int, typer.Option(rich_help_panel=FEATURE_PANEL, help="Of the noise.")]
ImageSize = Annotated[
    str | None,
    typer.Option(rich_help_panel=FEATURE_PANEL, metavar="H[xW]", help="Pixels to resize to; the model's own if none."),
]
Control = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=TECHNIQUE_PANEL,
        metavar="NAME",
        help='A ControlNet that is shown the image\'s Canny edges: "mini", a folder or a hub id; repeat for more.',
    ),
]
ControlScale = Annotated[
    list[float] | None,
    typer.Option(rich_help_panel=TECHNIQUE_PANEL, help="Of the ControlNets: one for all, or one each; 1 if none."),
]
DenoiseFrom = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=TECHNIQUE_PANEL, metavar="T", help="Noise to T, and denoise from there to each timestep."
    ),
]
DenoiseSteps = Annotated[
    int | None,
    typer.Option(rich_help_panel=TECHNIQUE_PANEL, metavar="N", help="Steps of that way; one per timestep if none."),
]
Inversion = Annotated[
    bool, typer.Option("--inversion", rich_help_panel=TECHNIQUE_PANEL, help="Invert the sampler, add no noise.")
]


def parse_timesteps(text: str) -> list[int]:
    """Timesteps separated by commas."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--timesteps: {text!r} is no list of timesteps, expected for instance 50,200") from None


def parse_items(given: Sequence[str] | None) -> tuple[str, ...]:
    """The items of an option that may be repeated and whose values may be separated by commas."""
    return tuple(part.strip() for each in given or () for part in each.split(",") if part.strip())


def parse_layers(given: Sequence[str] | None) -> str | Path | tuple[str, ...]:
    """The `layers` of a :class:`dsd_fast.FeatureExtractor`: a set's name, an official JSON file, or ids."""
    items = parse_items(given)
    if len(items) == 1 and items[0].endswith(".json"):
        return Path(items[0])
    if len(items) == 1 and not items[0].startswith(_PLACES):
        return items[0]
    return items or "practical"


def parse_resize(text: str) -> int | tuple[int, int]:
    """A factor, or height and width: 4, 16x16."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None:
        raise ValueError(f"--resize: {text!r} is no factor and no size, expected for instance 4 or 16x16")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def load_controls(
    names: Sequence[str] | None,
    scales: Sequence[float] | None,
    model: Model,
    *,
    dtype: str,
    local_files_only: bool,
) -> tuple[ControlNet, ...]:
    """The ControlNets that a command's options name, each with the edges of Canny, on the model's device.

    Raises:
        CommandError: another number of scales than of nets, or a file that cannot be read.
        ModelError: no ControlNet.
    """
    from dsd_fast.cli.terminal import CommandError
    from dsd_fast.models.controlnet import Control, load_controlnet

    chosen = list(names or ())
    factors = list(scales or (1.0,))
    if len(factors) not in (1, len(chosen)) or (scales and not chosen):
        raise CommandError(
            f"--control-scale: got {len(factors)} for {len(chosen)} --control, expected one, or one each"
        )
    if len(factors) == 1:
        factors *= len(chosen)
    found = []
    for name, scale in zip(chosen, factors, strict=True):
        try:
            net = load_controlnet(name, device=model.device, dtype=dtype, local_files_only=local_files_only)
        except OSError as error:
            raise CommandError(f"--control {name!r} cannot be read: {error}") from error
        found.append(Control(net, scale=scale))
    return tuple(found)
