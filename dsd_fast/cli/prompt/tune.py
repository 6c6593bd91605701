"""A tuning: a converter and its model to images, into a folder; pictures before and after, and what the run was."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from dsd_fast.cli.files import check_folder, writing
from dsd_fast.cli.images import ImageFiles
from dsd_fast.cli.prompt.options import FinetuneRequest
from dsd_fast.cli.prompt.pictures import IMAGES
from dsd_fast.cli.results import versions, write_json
from dsd_fast.cli.steps import showing_steps
from dsd_fast.cli.terminal import CommandError
from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter, TuneConfig
from dsd_fast.jobs import JobError, locked, remove_stale, replacing

HISTORY = "history.json"

_BEFORE, _AFTER = f"{IMAGES}/before", f"{IMAGES}/after"


def run(request: FinetuneRequest, config: ImagePromptConfig, tuning: TuneConfig) -> dict[str, Any]:
    """Tunes, and makes the pictures; what an earlier run of the same settings has left is gone on from.

    Returns:
        The content of history.json.

    Raises:
        CommandError: `out` cannot be written, or another process writes to it; images that are not there.
        KeyboardInterrupt: after Ctrl-C; the checkpoint is in `out`.
        ValueError: settings that are not allowed, or a folder of others.
    """
    out, sampling = request.out, request.pictures.sampling()
    images = ImageFiles(request.images, without=out)
    validation = None if request.tuning.validation is None else ImageFiles(request.tuning.validation, without=out)
    check_folder(out)
    request.source.check()
    model = request.source.load()
    converter = ImagePromptConverter(model, config=config)
    try:
        with writing(out):
            # Before the rest is done for nothing.
            with locked(out):
                remove_stale(out / HISTORY)
            start = time.perf_counter()
            with showing_steps("tuning", tuning.steps) as report:
                tuned = converter.finetune(
                    images, tuning, out=out, callback=report, progress=False, validation=validation
                )
            summary = {
                "command": "prompt finetune",
                "settings": {
                    "revision": model.revision,
                    "device": str(model.device),
                    **converter.settings(),
                    **asdict(tuning),
                },
                "versions": versions(),
                "images": len(images),
                "seconds": time.perf_counter() - start,
            }
            with locked(out), replacing(out / HISTORY) as file:
                write_json(file, summary)
    except JobError as error:
        raise CommandError(f"--out: {error}") from error
    return summary
