"""Options of features that several commands share, and how their values are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsd_fast.cli.groups import Options
from dsd_fast.cli.options import ModelOptions, check_timesteps, parse_image_size
from dsd_fast.cli.terminal import CommandError

if TYPE_CHECKING:
    from dsd_fast.models import Model
    from dsd_fast.models.controlnet import Control

FEATURE_PANEL = "Features"
TECHNIQUE_PANEL = "Technique"

# The parts of a network that ids begin with; sets' names do not.
_PLACES = ("down-", "mid-", "up-", "unet-", "vae-")


def parse_timesteps(text: str) -> list[int]:
    """Reads timesteps separated by commas."""
    try:
        given = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--timesteps: {text!r} is no list of timesteps, expected for instance 50,200") from None
    # Of none the configuration says it.
    return check_timesteps(text, given) if given else given


def parse_items(given: Sequence[str] | None) -> tuple[str, ...]:
    """Reads the items of an option that may be repeated and whose values may be separated by commas."""
    return tuple(part.strip() for each in given or () for part in each.split(",") if part.strip())


def parse_layers(given: Sequence[str] | None) -> str | Path | tuple[str, ...]:
    """Reads the `layers` of a :class:`dsd_fast.FeatureExtractor`: a set's name, an official JSON file, or ids."""
    items = parse_items(given)
    if len(items) == 1 and items[0].endswith(".json"):
        return Path(items[0])
    if len(items) == 1 and not items[0].startswith(_PLACES):
        return items[0]
    return items or "practical"


Images = Annotated[
    list[Path],
    typer.Argument(help="Image files, and folders that are searched for JPEG, PNG and WebP files.", show_default=False),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|ID,ID,…|FILE.json",
        help="A set by name (practical, legacy, all, …), layer ids, or an official JSON file; practical if none.",
    ),
    parse_layers,
]
Timesteps = Annotated[str, typer.Option(metavar="T,T,…", help="Exactly these; 0 is the clean latent."), parse_timesteps]
Draws = Annotated[int, typer.Option(help="Noise draws, averaged.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
ImageSize = Annotated[
    str | None,
    typer.Option(metavar="H[xW]", help="Pixels to resize to; the model's own if none."),
    parse_image_size,
]


class ControlOptions(Options, panel=TECHNIQUE_PANEL):
    """ControlNets."""

    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help='A ControlNet that is shown the image\'s Canny edges: "mini", a folder or a hub id; repeat for more.',
        ),
    ] = None
    control_scale: Annotated[
        list[float] | None, typer.Option(help="Of the ControlNets: one for all, or one each; 1 if none.")
    ] = None

    def check(self) -> None:
        """Refuses what cannot be loaded, whatever the model is.

        Raises:
            CommandError: another number of scales than of nets.
            ModelError: a folder that is not there.
        """
        from dsd_fast.models.hub import local_folder

        names, scales = self.control or [], self.control_scale or []
        if len(scales) not in (0, 1, len(names)) or (scales and not names):
            raise CommandError(
                f"--control-scale: got {len(scales)} for {len(names)} --control, expected one, or one each"
            )
        for name in names:
            local_folder(name, "ControlNet")

    def load(self, model: "Model", source: ModelOptions) -> "tuple[Control, ...]":
        """Loads the ControlNets, each with the edges of Canny, on the model's device, as `source` says.

        Raises:
            CommandError: as :meth:`check`, or a file that cannot be read.
            ModelError: no ControlNet.
        """
        from dsd_fast.models.controlnet import Control, load_controlnet

        self.check()
        names, scales = self.control or [], self.control_scale or [1.0]
        if len(scales) == 1:
            scales = scales * len(names)
        controls = []
        for name, scale in zip(names, scales, strict=True):
            try:
                net = load_controlnet(
                    name, device=model.device, dtype=source.dtype, local_files_only=source.local_files_only
                )
            except OSError as error:
                raise CommandError(f"--control {name!r} cannot be read: {error}") from error
            controls.append(Control(net, scale=scale))
        return tuple(controls)


class LatentOptions(Options, panel=TECHNIQUE_PANEL):
    """How latents are made, under the names of :class:`dsd_fast.Technique`."""

    denoise_from: Annotated[
        int | None, typer.Option(metavar="T", help="Noise to T, and denoise from there to each timestep.")
    ] = None
    denoise_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps of that way; one per timestep if none.")
    ] = None
    inversion: Annotated[bool, typer.Option("--inversion", help="Invert the sampler, add no noise.")] = False
