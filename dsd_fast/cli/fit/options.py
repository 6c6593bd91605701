"""Options of ``dsd-fast fit``."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsd_fast.cli.data import DataOptions
from dsd_fast.cli.groups import Options
from dsd_fast.cli.options import MEMORY_PANEL, AdaptedModelOptions, MemoryOptions, ScoreOptions

if TYPE_CHECKING:
    from dsd_fast.matching import FitConfig


def parse_range(text: str | None) -> tuple[int, int] | None:
    """Reads a first timestep and one past the last: 0,500; None stays None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)\s*,\s*(\d+)", text.strip())
    if match is None:
        raise ValueError(f"--timestep-range: {text!r} is no range, expected for instance 0,500")
    return int(match[1]), int(match[2])


class FitData(DataOptions):
    """Groups to learn from, and those to look at."""

    official_split: Annotated[
        bool, typer.Option("--official-split", help="The official few-shot part of the groups.")
    ] = False
    validation: Annotated[Path | None, typer.Option(metavar="FILE", help="Held-out groups, in the same format.")] = None
    validation_split: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Hold this share of the groups out, image by image.")
    ] = None


class FitOptions(Options, panel="Fit"):
    """The methods of a fit, and the settings of a :class:`dsd_fast.FitConfig`; None leaves one to it."""

    method: Annotated[
        list[str] | None, typer.Option(metavar="lora|prompt|heads", help="Repeat for more at once; lora if none.")
    ] = None
    official_recipe: Annotated[
        bool,
        typer.Option(
            "--official-recipe",
            help="The official code's settings where none is given; its loss only with --official, of its score.",
        ),
    ] = False
    steps: Annotated[int | None, typer.Option(help="Of the optimiser; 300 if none.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Groups a step; 8 if none, officially 1.")] = None
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="cross-entropy|margin",
            help="Over a group's candidates; cross-entropy if none, officially margin.",
        ),
    ] = None
    temperature: Annotated[float | None, typer.Option(help="Of the cross-entropy; 0.3 if none.")] = None
    margin: Annotated[float | None, typer.Option(help="0.1 if none.")] = None
    own_noise: Annotated[
        bool | None,
        typer.Option(
            "--own-noise/--shared-noise",
            help="Whether each candidate has its own timestep and noise; shared if none, officially its own.",
            show_default=False,
        ),
    ] = None
    learning_rate: Annotated[float | None, typer.Option(help="Of all methods; each one's own if none.")] = None
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="linear|constant",
            help="Of the learning rate; linear if none, which falls to 0 over the second half, officially constant.",
        ),
    ] = None
    warmup: Annotated[
        int | None, typer.Option(help="Steps until the full learning rate; 10 if none, officially 0.")
    ] = None
    weight_decay: Annotated[float | None, typer.Option(help="Of the LoRA; 1 if none, officially 0.01.")] = None
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of the gradient; 1 if none.")] = None
    timestep_range: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Train on timesteps from A up to, not including, B; on all if none."),
        parse_range,
    ] = None
    rank: Annotated[int | None, typer.Option(help="Of the LoRA; 4 if none.")] = None
    attention: Annotated[
        str | None,
        typer.Option(metavar="cross|all", help="Layers of the LoRA; cross if none, officially all."),
    ] = None
    lora_dropout: Annotated[float | None, typer.Option(help="0 if none.")] = None
    prompt_tokens: Annotated[int | None, typer.Option(help="Number of learned vectors; 8 if none.")] = None
    validate_every: Annotated[
        int | None,
        typer.Option(help="Steps between looks at held-out groups; 50 if none."),
    ] = None
    patience: Annotated[int | None, typer.Option(help="Looks without a better one before it stops.")] = None
    fit_seed: Annotated[int, typer.Option("--seed", help="Of all that the fit draws, and of --validation-split.")] = 0
    micro_batch: Annotated[
        int | None,
        typer.Option(rich_help_panel=MEMORY_PANEL, help="Groups at a time; all of a step's if none."),
    ] = None
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", rich_help_panel=MEMORY_PANEL, help="Less memory, a third more time."),
    ] = False
    autocast: Annotated[
        str | None,
        typer.Option(rich_help_panel=MEMORY_PANEL, metavar="bfloat16|float16", help="Train in this type."),
    ] = None
    save_every: Annotated[float, typer.Option(rich_help_panel=MEMORY_PANEL, help="Seconds between checkpoints.")] = 60.0

    def config(self) -> "FitConfig":
        """Makes the settings of the fit, the official recipe's or the package's own where an option is None.

        Raises:
            ValueError: text that is no value of its option, or a value that is not allowed, by name.
        """
        settings = self.values()
        own_noise = settings.pop("own_noise")
        settings |= {"seed": self.fit_seed, "shared_noise": None if own_noise is None else not own_noise}
        from dsd_fast.matching import FitConfig

        names = {field.name for field in fields(FitConfig)}
        chosen = {name: value for name, value in settings.items() if name in names and value is not None}
        if not self.official_recipe:
            return FitConfig(**chosen)
        # The recipe has no number of steps of its own.
        return replace(FitConfig.official(chosen.get("steps", FitConfig.steps)), **chosen)


class FitScoreOptions(ScoreOptions):
    """The score that is fitted; ``--seed`` is of the fit."""

    seed: Annotated[int, typer.Option("--noise-seed", help="Of the score's noise.")] = 0


class FitRequest(Options):
    """A data set, a score, and how it is fitted."""

    data: FitData
    out: Annotated[Path, typer.Option(help="Folder of the matcher and its checkpoints.", show_default=False)]
    fit: FitOptions
    official_lora: Annotated[
        bool, typer.Option("--official-lora", help="Write the LoRA as the official code reads it, too.")
    ] = False
    memory: MemoryOptions
    source: AdaptedModelOptions
    score: FitScoreOptions
