"""Options of ``dsd-fast demo``, and what its results call the kinds of captions."""

from pathlib import Path
from typing import Annotated

import typer

from dsd_fast.cli.groups import Options
from dsd_fast.cli.options import Device, Dtype, Timesteps

LABELS = {
    "true": "true",
    "colour": "another colour",
    "shape": "another shape",
    "swap": "colours swapped",
    "relation": "opposite relation",
    "all": "all of its scene",
}


class DemoRequest(Options):
    """How much is scored, and by what."""

    out: Annotated[Path, typer.Option(help="Folder of the report, the pictures and the results.")] = Path("demo")
    scenes: Annotated[int, typer.Option(min=1, help="Scenes to score.")] = 150
    reference_scenes: Annotated[int, typer.Option(min=1, help="How many of them the reference scores too.")] = 8
    timesteps: Timesteps = "4"
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0
    device: Device = "cpu"
    dtype: Dtype = "float32"
