"""``dsd-fast prompt convert``, ``edit``, ``finetune`` and ``customize``."""

from __future__ import annotations

import typer
from rich.console import Console

from dsd_fast.cli.groups import command
from dsd_fast.cli.prompt.options import ConvertRequest, CustomizeRequest, EditRequest, FinetuneRequest
from dsd_fast.cli.terminal import (
    EXIT_INTERRUPTED,
    CommandError,
    end,
    fail,
    show_errors,
    show_line,
    show_outcome,
)

prompt = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@prompt.callback()
def about() -> None:
    """Images as prompts: CLIP's vector of an image, in the place of a text."""


@prompt.command()
@command
def convert(request: ConvertRequest) -> None:
    """Make a prompt of each image, which `dsd-fast generate --image-prompts` makes variations of.

    Writes shards of safetensors and a Parquet index into --out, a vector for each image. A run that was killed goes on
    when the same command is given again, and the files are the same in the end; other settings for the same folder are
    refused. An image that cannot be used becomes an error row.

    Exit code: 0 when every image has its prompt, 1 when some could not be used, 2 when nothing could be done or the
    disk is full, 130 after Ctrl-C.
    """
    _convert(request)


@prompt.command()
@command
def edit(request: EditRequest) -> None:
    """Make a prompt of each image together with a text, which says what is to be otherwise.

    The text's words stand before the image's vector, and --alpha of its own states from its end on is added to that.
    Else as `dsd-fast prompt convert`.
    """
    if not request.texts.prompt and request.texts.prompts is None:
        raise CommandError("give --prompt TEXT, or --prompts FILE, that images are edited by")
    _convert(request)


@prompt.command()
@command
def finetune(request: FinetuneRequest) -> None:
    """Tune CLIP's view of images, and the network's of prompts, to a domain of about 100 images (SD-IPC-FT).

    Writes into --out the learned prompts of the image encoder and a LoRA, which stock diffusers loads: convert with
    `--tuned DIR`, make images with `dsd-fast generate --image-prompts … --adapter DIR`.

    The same command goes on where an earlier one was stopped, even by kill -9, to the same result. One with other
    settings is refused.

    Exit code: 0 when it is done, 2 when nothing could be done, 130 after Ctrl-C, which keeps the checkpoint.
    """
    _tune("finetune", request)


@prompt.command()
@command
def customize(request: CustomizeRequest) -> None:
    """Tune to one image, or a few of one thing, in some tens of steps (SD-IPC-CT).

    Learns a LoRA alone, unless --prompt-tokens asks for more. Else as `dsd-fast prompt finetune`.
    """
    _tune("customize", request)


def _convert(request: ConvertRequest) -> None:
    """Converts, and prints the first errors, how vectors were made, and the counts."""
    request.check()
    config = request.converter.config(request.source)
    from dsd_fast.cli.prompt.convert import run
    from dsd_fast.cli.prompt.report import made_by

    summary = run(request, config)
    console, counts = Console(), summary["counts"]
    errors = counts["errors"] + counts["done_errors"]
    rows = [(error["reason"], error["message"]) for error in summary["errors"]]
    show_errors(console, "no prompt", rows, errors, "the index")
    show_line(console, made_by(summary["settings"]))
    show_outcome(console, summary, "converted", f"{summary['overlap']:.0%} of the writing while computing", request.out)
    end(summary["complete"], errors)


def _tune(name: str, request: FinetuneRequest) -> None:
    """Tunes, and prints how the loss went, the time and the memory."""
    config, tuning = request.converter.config(request.source), request.tuning.tuning()
    from dsd_fast.cli.prompt.report import told
    from dsd_fast.cli.prompt.tune import run

    try:
        summary = run(name, request, config, tuning)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on from what is in {request.out}", EXIT_INTERRUPTED)
    show_line(Console(), f"{told(summary)}. Results: {request.out}")
