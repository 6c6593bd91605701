"""A tuning: a converter and its model to images, into a folder; pictures before and after, and what the run was."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsd_fast.cli.files import check_folder, writing
from dsd_fast.cli.images import ImageFiles
from dsd_fast.cli.prompt.options import FinetuneRequest
from dsd_fast.cli.prompt.pictures import write_sheets
from dsd_fast.cli.prompt.report import figures, render_tuned
from dsd_fast.cli.results import versions, write_json
from dsd_fast.cli.steps import history_of, showing_steps
from dsd_fast.cli.terminal import CommandError
from dsd_fast.generation.config import GenerateConfig
from dsd_fast.image_prompt import ImagePromptConfig, ImagePromptConverter, TuneConfig
from dsd_fast.jobs import JobError, locked, remove_stale, replacing

HISTORY = "history.json"


def run(name: str, request: FinetuneRequest, config: ImagePromptConfig, tuning: TuneConfig) -> dict[str, Any]:
    """Tunes, and makes the pictures; what an earlier run of the same settings has left is gone on from.

    Args:
        name: of the command.

    Returns:
        The content of history.json.

    Raises:
        CommandError: `out` cannot be written, or another process writes to it; images that are not there.
        KeyboardInterrupt: after Ctrl-C; the checkpoint is in `out`.
        ValueError: settings that are not allowed, or a folder of others.
        ImageError: an image that cannot be used.
    """
    out, sampling = request.out, request.pictures.sampling()
    images = ImageFiles(request.images, without=out)
    held_out = None if request.tuning.validation is None else ImageFiles(request.tuning.validation, without=out)
    check_folder(out)
    request.source.check()
    converter = request.source.load_converter(config)
    try:
        with writing(out):
            # Before anything is learned for nothing.
            with locked(out):
                remove_stale(out / HISTORY)
            with showing_steps("tuning", tuning.steps) as report:
                tuned = converter.finetune(
                    images, tuning, out=out, callback=report, progress=False, validation=held_out
                )
            told = tuned.tuning
            assert told is not None
            summary = {
                "command": f"prompt {name}",
                "settings": {
                    **converter.settings(),
                    "device": str(converter.model.device),
                    "adapter": request.source.adapter,
                    "clip": request.source.clip,
                    "tuned": None if request.source.tuned is None else str(request.source.tuned),
                    **asdict(tuning),
                },
                "versions": versions(),
                "images": len(images),
                "held_out": len(held_out or ()),
                "parameters": told.parameters,
                "seconds": told.seconds,
                "peak_bytes": told.peak_bytes,
                **history_of(told.history),
            }
            with locked(out), replacing(out / HISTORY) as file:
                write_json(file, summary)
            shown = _pictures(request, images, [converter, tuned], sampling)
            if request.pictures.report:
                with locked(out), replacing(out / "report.html") as file:
                    file.write(render_tuned(summary, shown, _loading(converter.model.name, out, images[0])))
    except JobError as error:
        raise CommandError(f"--out: {error}") from error
    return summary


def _pictures(
    request: FinetuneRequest, images: ImageFiles, converters: list[ImagePromptConverter], sampling: GenerateConfig
) -> list[str]:
    """Shows the first images beside their variations before and after."""
    chosen, out = request.pictures, request.out
    first, names = images[: chosen.pictures], images.names[: chosen.pictures]
    if not first:
        return []
    sides = [(each.model, each.convert(first, names=names)) for each in converters]
    return figures(write_sheets(out, first, [""] * len(first), sides, sampling, chosen.variations))


def _loading(model: str, out: Path, image: Path) -> str:
    """Python that makes variations with what was learned."""
    return (
        f"from pathlib import Path\n\nimport dsd_fast as dsd\n\nmodel = dsd.load({model!r})\n"
        f"converter = dsd.ImagePromptConverter.load({str(out)!r}, model)\n"
        f"prompts = converter.convert([Path({str(image)!r})])\n"
        "for image in dsd.generate(converter.model, prompts):\n    image.show()"
    )
