"""One image of a folder made again, and compared with its file."""

from __future__ import annotations

from dataclasses import replace

from dsd_fast.cli.generate.options import GenerateRequest
from dsd_fast.cli.options import parse_bytes
from dsd_fast.cli.terminal import CommandError
from dsd_fast.generation.again import Again, again, config_of
from dsd_fast.generation.files import read_settings
from dsd_fast.generation.sampler import Sampler
from dsd_fast.images import ImageError
from dsd_fast.jobs import JobError


def run_again(request: GenerateRequest, row: str) -> Again:
    """Makes the image of a row again.

    The model is the manifest's, on the device of the command line; what else the folder was made with (a LoRA, tokens,
    ControlNets) is loaded as the options say.

    Raises:
        CommandError: options that the folder has answered already, no folder of generated images, another model than
            it was made with, or no image of that row.
    """
    groups = (request.rows, request.sampling, request.acceptance, request.files, request.workers)
    given = ["PROMPT"] if request.texts else [name for group in groups for name in group.changed()]
    if given:
        raise CommandError(f"--row: got {given[0]} too, expected none: the folder says how its images were made")
    try:
        settings = read_settings(request.out)
        config = config_of(request.out, parse_bytes(request.memory.memory_budget))
        source = replace(
            request.source, model=settings["model"], revision=settings["revision"], dtype=settings["model_dtype"]
        )
        source.check()
        request.controls.check()
        model = source.load()
        sampler = Sampler(model, config, controls=request.controls.load(model, source))
        return next(again(sampler, request.out, [row]))
    except (JobError, ImageError) as error:
        raise CommandError(f"--row: {error}") from error
