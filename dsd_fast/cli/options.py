"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dsd_fast.models import Model

MODEL_PANEL = "Model"
SCORE_PANEL = "Score"

Device = Annotated[str, typer.Option(rich_help_panel=MODEL_PANEL, help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(rich_help_panel=MODEL_PANEL, help="float32, float16, bfloat16 or float64.")]
Revision = Annotated[str | None, typer.Option(rich_help_panel=MODEL_PANEL, help="Branch, tag or commit of a hub id.")]
Variant = Annotated[
    str | None, typer.Option(rich_help_panel=MODEL_PANEL, help="Variant of the weight files, e.g. fp16.")
]
Offline = Annotated[
    bool,
    typer.Option(
        "--local-files-only", "--offline", rich_help_panel=MODEL_PANEL, help="Take hub ids from the cache alone."
    ),
]

Timesteps = Annotated[
    str,
    typer.Option(
        rich_help_panel=SCORE_PANEL,
        metavar="N|T,T,…",
        help="How many, on the official grid; or which, separated by commas.",
    ),
]

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int:
    """A size: 512MB (powers of 1000), 2GiB (powers of 1024), or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"--memory-budget: {text!r} is no size, expected for instance 512MB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2]])


def parse_timesteps(text: str) -> int | list[int]:
    """A count, or timesteps separated by commas; one timestep with a comma after it is a list."""
    try:
        if "," not in text:
            return int(text)
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--timesteps: {text!r} is neither a count nor timesteps separated by commas") from None


def parse_pool(text: str) -> str | float:
    """mean, max, or a temperature."""
    if text in ("mean", "max"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--pool: {text!r} is neither mean, max nor a temperature") from None


def parse_image_size(text: str) -> tuple[int, int]:
    """One side of a square, or height and width: 512, 512x768."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None:
        raise ValueError(f"--image-size: {text!r} is no size, expected for instance 512 or 512x768 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def quiet_transformers() -> None:
    """Pipelines import image processors that nothing here uses, and transformers warns about each."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def exact_products() -> None:
    """What a command calls float32 has IEEE products on a GPU too, where cuDNN's convolutions would take TF32."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


def load_model(
    name: str, *, device: str, dtype: str, revision: str | None, variant: str | None, local_files_only: bool
) -> Model:
    """:func:`dsd_fast.load`, announced on stderr, for a command that computes with :func:`exact_products`."""
    from rich.console import Console

    from dsd_fast.cli.terminal import CommandError, printable
    from dsd_fast.models import load

    quiet_transformers()
    exact_products()
    # Not a live display: the hub's own progress bars may follow.
    Console(stderr=True).print(f"loading {printable(name)}", style="dim", markup=False, highlight=False)
    try:
        return load(
            name, device=device, dtype=dtype, revision=revision, variant=variant, local_files_only=local_files_only
        )
    except OSError as error:
        raise CommandError(f"model {name!r} cannot be read: {error}") from error
