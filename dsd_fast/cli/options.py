"""Options of models and scores that several commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dsd_fast.models import Model

MODEL_PANEL = "Model"
SCORE_PANEL = "Score"
MEMORY_PANEL = "Memory and time"

ModelName = Annotated[
    str, typer.Option("--model", rich_help_panel=MODEL_PANEL, help='"mini", a hub id, or a diffusers folder.')
]
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
Adapter = Annotated[
    str | None, typer.Option(rich_help_panel=MODEL_PANEL, help='A LoRA: "mini", a .safetensors file, folder or hub id.')
]
AdapterFile = Annotated[
    str | None, typer.Option(rich_help_panel=MODEL_PANEL, help="Which file, where --adapter has several.")
]

Timesteps = Annotated[
    str,
    typer.Option(
        rich_help_panel=SCORE_PANEL,
        metavar="N|T,T,…",
        help="How many, on the official grid; or which, separated by commas.",
    ),
]
Draws = Annotated[int, typer.Option(rich_help_panel=SCORE_PANEL, help="Noise draws per timestep.")]
NoiseSeed = Annotated[int, typer.Option(rich_help_panel=SCORE_PANEL, help="Of the score's noise.")]
AttentionWeight = Annotated[float, typer.Option(rich_help_panel=SCORE_PANEL, help="Of the cross-attention term.")]
NoiseWeight = Annotated[float, typer.Option(rich_help_panel=SCORE_PANEL, help="Of the noise-prediction term.")]
Layer = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=SCORE_PANEL,
        metavar="ID|all",
        help="A score id to read, repeat for more; or all, every cross-attention. The official ones if not given.",
    ),
]
Tokens = Annotated[
    str, typer.Option(rich_help_panel=SCORE_PANEL, metavar="all|real", help="Text tokens that are scored.")
]
Pool = Annotated[
    str,
    typer.Option(rich_help_panel=SCORE_PANEL, metavar="mean|max|τ", help="Pooling over positions; τ is a temperature."),
]
Official = Annotated[
    bool, typer.Option("--official", rich_help_panel=SCORE_PANEL, help="The official code's score to the last digit.")
]
ImageSize = Annotated[
    str | None,
    typer.Option(rich_help_panel=SCORE_PANEL, metavar="H[xW]", help="Pixels to resize to; the model's own if none."),
]

MemoryBudget = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MEMORY_PANEL,
        help="For activations and text keys, e.g. 512MB or 2GiB; the device's if none.",
    ),
]
Runtime = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MEMORY_PANEL,
        metavar="inductor|cudagraph",
        help="Compile the network, which takes minutes at first; for many images or steps.",
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


def parse_range(text: str) -> tuple[int, int]:
    """A first timestep and one past the last: 0,500."""
    match = re.fullmatch(r"(\d+)\s*,\s*(\d+)", text.strip())
    if match is None:
        raise ValueError(f"--timestep-range: {text!r} is no range, expected for instance 0,500")
    return int(match[1]), int(match[2])


def parse_layers(given: Sequence[str] | None) -> str | tuple[str, ...]:
    """The `layers` of a :class:`dsd_fast.MatchConfig`: score ids, "all", or "official" where none is given."""
    if not given:
        return "official"
    if "all" not in given:
        return tuple(given)
    if len(given) > 1:
        raise ValueError(f"--layer: all is every cross-attention, expected it alone, got {', '.join(given)}")
    return "all"


def match_settings(
    *,
    timesteps: str,
    draws: int,
    seed: int,
    attention_weight: float,
    noise_weight: float,
    layer: Sequence[str] | None,
    tokens: str,
    pool: str,
    official: bool,
    image_size: str | None,
    memory_budget: str | None,
) -> dict[str, Any]:
    """The arguments of a :class:`dsd_fast.MatchConfig` that a command's options stand for.

    Raises:
        ValueError: text that is no value of its option, by name.
    """
    return {
        "timesteps": parse_timesteps(timesteps),
        "layers": parse_layers(layer),
        "attention_weight": attention_weight,
        "noise_weight": noise_weight,
        "draws": draws,
        "seed": seed,
        "tokens": tokens,
        "pool": parse_pool(pool),
        "official": official,
        "image_size": None if image_size is None else parse_image_size(image_size),
        "memory_budget": None if memory_budget is None else parse_bytes(memory_budget),
    }


def quiet_transformers() -> None:
    """Pipelines import image processors that nothing here uses, and transformers warns about each."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def exact_products() -> None:
    """What a command calls float32 has IEEE products on a GPU too, where cuDNN's convolutions would take TF32."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


def load_model(
    name: str,
    *,
    device: str,
    dtype: str,
    revision: str | None,
    variant: str | None,
    local_files_only: bool,
    adapter: str | None = None,
    adapter_file: str | None = None,
) -> Model:
    """:func:`dsd_fast.load`, announced on stderr, for a command that computes with :func:`exact_products`.

    With an `adapter` that LoRA is active in it, under the name "adapter".
    """
    from rich.console import Console

    from dsd_fast.cli.terminal import CommandError, printable
    from dsd_fast.models import load

    quiet_transformers()
    exact_products()
    # Not a live display: the hub's own progress bars may follow.
    Console(stderr=True).print(f"loading {printable(name)}", style="dim", markup=False, highlight=False)
    try:
        model = load(
            name, device=device, dtype=dtype, revision=revision, variant=variant, local_files_only=local_files_only
        )
    except OSError as error:
        raise CommandError(f"model {name!r} cannot be read: {error}") from error
    if adapter is not None:
        model.load_lora(adapter, "adapter", adapter_file)
    return model
