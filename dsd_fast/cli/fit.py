"""``dsd-fast fit``: adapts the score to the groups of a data set."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsd_fast.cli import data_options, options
from dsd_fast.cli.data_options import DATA_PANEL
from dsd_fast.cli.options import MEMORY_PANEL
from dsd_fast.cli.terminal import EXIT_INTERRUPTED, CommandError, fail, one_sentence

if TYPE_CHECKING:
    from dsd_fast.matching import Matcher

FIT_PANEL = "Fit"


def fit(
    data: data_options.Data,
    out: Annotated[Path, typer.Option(help="Folder of the matcher and its checkpoints.", show_default=False)],
    format: data_options.Format = None,
    images: data_options.Images = None,
    image_name: data_options.ImageName = None,
    negatives_seed: data_options.NegativesSeed = 0,
    official_split: Annotated[
        bool,
        typer.Option("--official-split", rich_help_panel=DATA_PANEL, help="The official few-shot part of the groups."),
    ] = False,
    limit: data_options.Limit = None,
    validation: Annotated[
        Path | None,
        typer.Option(rich_help_panel=DATA_PANEL, metavar="FILE", help="Held-out groups, in the same format."),
    ] = None,
    validation_split: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=DATA_PANEL, metavar="SHARE", help="Hold this share of the groups out, image by image."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=FIT_PANEL, metavar="lora|prompt|heads", help="Repeat for more at once; lora if none."
        ),
    ] = None,
    official_recipe: Annotated[
        bool,
        typer.Option(
            "--official-recipe",
            rich_help_panel=FIT_PANEL,
            help="The official code's settings where none is given; its loss only with --official, of its score.",
        ),
    ] = False,
    steps: Annotated[int | None, typer.Option(rich_help_panel=FIT_PANEL, help="Of the optimiser; 300 if none.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(rich_help_panel=FIT_PANEL, help="Groups a step; 8 if none, officially 1.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=FIT_PANEL,
            metavar="cross-entropy|margin",
            help="Over a group's candidates; cross-entropy if none, officially margin.",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(rich_help_panel=FIT_PANEL, help="Of the cross-entropy; 0.3 if none.")
    ] = None,
    margin: Annotated[float | None, typer.Option(rich_help_panel=FIT_PANEL, help="0.1 if none.")] = None,
    own_noise: Annotated[
        bool | None,
        typer.Option(
            "--own-noise/--shared-noise",
            rich_help_panel=FIT_PANEL,
            help="Whether each candidate has its own timestep and noise; shared if none, officially its own.",
            show_default=False,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(rich_help_panel=FIT_PANEL, help="Of all methods; each one's own if none.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=FIT_PANEL,
            metavar="linear|constant",
            help="Of the learning rate; linear if none, which falls to 0 over the second half, officially constant.",
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(rich_help_panel=FIT_PANEL, help="Steps until the full learning rate; 10 if none, officially 0."),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(rich_help_panel=FIT_PANEL, help="Of the LoRA; 1 if none, officially 0.01.")
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option(rich_help_panel=FIT_PANEL, help="Largest norm of the gradient; 1 if none.")
    ] = None,
    timestep_range: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=FIT_PANEL,
            metavar="A,B",
            help="Train on timesteps from A up to, not including, B; on all if none.",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(rich_help_panel=FIT_PANEL, help="Of the LoRA; 4 if none.")] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=FIT_PANEL, metavar="cross|all", help="Layers of the LoRA; cross if none, officially all."
        ),
    ] = None,
    lora_dropout: Annotated[float | None, typer.Option(rich_help_panel=FIT_PANEL, help="0 if none.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(rich_help_panel=FIT_PANEL, help="Number of learned vectors; 8 if none.")
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(rich_help_panel=FIT_PANEL, help="Steps between looks at held-out groups; 50 if none.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(rich_help_panel=FIT_PANEL, help="Looks without a better one before it stops.")
    ] = None,
    seed: Annotated[
        int, typer.Option(rich_help_panel=FIT_PANEL, help="Of all that the fit draws, and of --validation-split.")
    ] = 0,
    official_lora: Annotated[
        bool, typer.Option("--official-lora", help="Write the LoRA as the official code reads it, too.")
    ] = False,
    micro_batch: Annotated[
        int | None, typer.Option(rich_help_panel=MEMORY_PANEL, help="Groups at a time; all of a step's if none.")
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", rich_help_panel=MEMORY_PANEL, help="Less memory, a third more time."),
    ] = False,
    autocast: Annotated[
        str | None,
        typer.Option(rich_help_panel=MEMORY_PANEL, metavar="bfloat16|float16", help="Train in this type."),
    ] = None,
    save_every: Annotated[
        float, typer.Option(rich_help_panel=MEMORY_PANEL, help="Seconds between checkpoints.")
    ] = 60.0,
    runtime: options.Runtime = None,
    memory_budget: options.MemoryBudget = None,
    model: options.ModelName = "mini",
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    variant: options.Variant = None,
    local_files_only: options.Offline = False,
    adapter: options.Adapter = None,
    adapter_file: options.AdapterFile = None,
    timesteps: options.Timesteps = "10",
    draws: options.Draws = 1,
    noise_seed: options.NoiseSeed = 0,
    attention_weight: options.AttentionWeight = 0.5,
    noise_weight: options.NoiseWeight = 1.0,
    layer: options.Layer = None,
    tokens: options.Tokens = "all",
    pool: options.Pool = "mean",
    official: options.Official = False,
    image_size: options.ImageSize = None,
) -> None:
    """Adapt the score to the groups of a data set: a LoRA, learned prompt vectors, or weights of heads.

    Writes the fitted matcher into --out, which `dsd-fast evaluate --matcher` and `Matcher.load` take, and history.json:
    settings, versions, and each look at the training. With held-out groups the parameters that do best on them are
    kept. A LoRA's file is one that stock diffusers loads.

    The same command goes on where an earlier one was stopped, even by kill -9, to the same result. One with other
    settings is refused.

    Exit code: 0 when the fit is done, 2 when nothing could be done, 130 after Ctrl-C, which keeps the checkpoint.
    """
    with one_sentence():
        given = {
            "steps": steps,
            "batch_size": batch_size,
            "micro_batch": micro_batch,
            "loss": loss,
            "temperature": temperature,
            "margin": margin,
            "shared_noise": None if own_noise is None else not own_noise,
            "learning_rate": learning_rate,
            "schedule": schedule,
            "warmup": warmup,
            "weight_decay": weight_decay,
            "clip_norm": clip_norm,
            "timestep_range": None if timestep_range is None else options.parse_range(timestep_range),
            "rank": rank,
            "attention": attention,
            "lora_dropout": lora_dropout,
            "prompt_tokens": prompt_tokens,
            "validate_every": validate_every,
            "patience": patience,
            "checkpointing": checkpointing,
            "autocast": autocast,
            "save_every": save_every,
            "seed": seed,
        }
        settings = options.match_settings(
            timesteps=timesteps,
            draws=draws,
            seed=noise_seed,
            attention_weight=attention_weight,
            noise_weight=noise_weight,
            layer=layer,
            tokens=tokens,
            pool=pool,
            official=official,
            image_size=image_size,
            memory_budget=memory_budget,
        )
        if validation is not None and validation_split is not None:
            raise CommandError("give --validation or --validation-split, not both")
        from dsd_fast.cli.fit_run import fit_config, hold_out, run, show
        from dsd_fast.matching import MatchConfig, Matcher
        from dsd_fast.matching.fitting.config import parse_methods
        from dsd_fast.matching.fitting.loop import CHECKPOINT

        config, fitting = MatchConfig(**settings), fit_config(official_recipe, given)
        methods = parse_methods(method or "lora")
        if official_lora and "lora" not in methods:
            raise CommandError("--official-lora: there is no LoRA without --method lora")
        part = "train" if official_split else None
        groups = data_options.read_data(data, format, images, image_name, negatives_seed, part, limit)
        held_out = None
        if validation is not None:
            held_out = data_options.read_data(validation, format, images, image_name, negatives_seed, None, None)
        elif validation_split is not None:
            groups, held_out = hold_out(groups, validation_split, seed)

        load_model = partial(
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

        def load() -> Matcher:
            made = Matcher(load_model(), config)
            return made if runtime is None else made.compile(runtime)

        about = {
            "data": str(data),
            "format": format,
            "images": None if images is None else str(images),
            "image_name": image_name,
            "negatives_seed": negatives_seed,
            "official_split": official_split,
            "limit": limit,
            "validation": None if validation is None else str(validation),
            "validation_split": validation_split,
            "adapter": adapter,
            "runtime": runtime,
        }
        try:
            summary = run(load, groups, held_out, methods, fitting, out, about, official_lora)
        except KeyboardInterrupt:
            kept = (out / CHECKPOINT).is_file()
            goes_on = f"; the same command goes on from the checkpoint in {out}" if kept else ""
            fail(f"interrupted{goes_on}", EXIT_INTERRUPTED)
    show(summary, out)
