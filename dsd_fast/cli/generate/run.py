"""A generation: rows through a Sampler into a job's folder, its end, and report.html."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dsd_fast.cli import cluster
from dsd_fast.cli.files import check_folder, writing
from dsd_fast.cli.generate.options import GenerateRequest
from dsd_fast.cli.generate.report import Tile, render
from dsd_fast.cli.job_report import files_of, hidden_share, last_timeline, summary
from dsd_fast.cli.results import versions
from dsd_fast.cli.terminal import CommandError
from dsd_fast.engine import ImagePrompt
from dsd_fast.generation.card import loading
from dsd_fast.generation.closing import close
from dsd_fast.generation.config import GenerateConfig
from dsd_fast.generation.encoding import check_format
from dsd_fast.generation.export import generate_to
from dsd_fast.generation.files import check_layout, read_images
from dsd_fast.generation.grids import grid, read_classes
from dsd_fast.generation.reading import read_rows
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.generation.sampler import Sampler
from dsd_fast.images import ImageError, load_image
from dsd_fast.jobs import all_ended, index_shards, read_manifest, replacing
from dsd_fast.jobs.lock import waiting

# Images of the contact sheet, and the longer side of each.
_TILES, _SIDE = 48, 256


def run(request: GenerateRequest) -> dict[str, Any]:
    """Makes all images; Ctrl-C ends it early, and the same command goes on.

    Returns:
        "complete"; "counts" of this run, or of the folder where it was interrupted; "errors", the first; "seconds", and
        "encoding" and "writing", the shares of these that went on while images were computed; "folder", what the
        closing step tells of all, where this was the last worker.

    Raises:
        CommandError: `out` belongs to another job or cannot be written; rows that are not there, or in two ways.
        ValueError: settings, or rows of a file, that are not what is expected.
    """
    config = GenerateConfig(**request.sampling.config(request.memory))
    _check(request)
    # Once without a model, so that what is wrong with a file is said before one is loaded.
    total = sum(1 for _ in _rows(request))
    acceptance, classes = request.acceptance, _classes(request)
    if acceptance.needs_classes() and not classes:
        name = "--accept" if acceptance.per_class is None else "--per-class"
        raise CommandError(f"{name}: given without classes, expected --template, or a table with labels")
    if acceptance.per_class is not None:
        total = acceptance.per_class * len(classes)
    make = partial(Generation, request, config)
    finish = partial(_finish, request)
    numbers = cluster.run(request.workers, make, request.out, total=total, unit="images", finish=finish)
    return _summary(numbers, total, request.out)


class Generation:
    """The work of the command, with all that it needs loaded."""

    def __init__(self, request: GenerateRequest, config: GenerateConfig) -> None:
        self.request = request
        # Of the machine that computes, which with Ray is another one.
        request.source.check()
        request.memory.check(request.source.device)
        request.controls.check()
        model = request.source.load()
        self.sampler = Sampler(model, config, controls=request.controls.load(model, request.source))
        if request.memory.runtime is not None:
            self.sampler.compile(request.memory.runtime)
        self.accept = request.acceptance.load(model, _classes(request), request.source)

    def __call__(self, worker: int, workers: int, progress: Callable[[int], None], /) -> dict[str, float]:
        """Makes one worker's images."""
        files, acceptance = self.request.files, self.request.acceptance
        made = generate_to(
            self.sampler,
            _rows(self.request),
            self.request.out,
            accept=self.accept,
            per_class=acceptance.per_class,
            max_tries=acceptance.max_tries,
            near_duplicates=acceptance.near_duplicates,
            layout=files.layout,
            format=files.format,
            quality=files.quality,
            mark=not files.no_mark,
            shard_rows=files.shard_rows,
            batch=files.batch,
            worker=worker,
            workers=workers,
            retry_errors=files.retry_errors,
            closes=False,
            progress=progress,
        )
        return {
            **asdict(made.counts),
            "writing": made.write_seconds,
            "writing_hidden": made.overlap * made.write_seconds,
            "encoding": made.encode_seconds,
            "encoding_hidden": made.encode_overlap * made.encode_seconds,
        }


def _rows(request: GenerateRequest) -> Iterator[GenerateRow]:
    """What the options ask for, each time anew.

    Raises:
        ValueError: by option, or by line and column of a file.
    """
    chosen, seeds = request.rows, request.rows.values()["seeds"]
    each = (0,) if seeds is None else (seeds,) if isinstance(seeds, int) else seeds
    if chosen.prompts is not None:
        rows = read_rows(chosen.prompts, seeds, ignore=chosen.ignore or ())
    elif chosen.template:
        rows = grid(chosen.template, _classes(request), 0 if seeds is None else seeds)
    elif chosen.image_prompts is not None:
        images = _image_prompts("--image-prompts", chosen.image_prompts)
        rows = (GenerateRow(image, seed, name=image.name) for image in images for seed in each)
    else:
        rows = (GenerateRow(text, seed) for text in request.texts or () for seed in each)
    negative = None
    if chosen.negative_image_prompt is not None:
        negative = _image_prompts("--negative-image-prompt", chosen.negative_image_prompt)
        if len(negative) != 1:
            raise ValueError(f"--negative-image-prompt: got {len(negative)} images as prompts, expected one")
    return map(partial(_with_pictures, request, negative), rows)


def _image_prompts(option: str, path: Path) -> ImagePrompt:
    try:
        found = ImagePrompt.load(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    if not len(found):
        raise ValueError(f"{option}: {path} has no image prompts")
    return found


def _classes(request: GenerateRequest) -> list[str]:
    """The classes of the templates, or of the file's rows."""
    chosen = request.rows
    named = chosen.class_name or chosen.classes
    if named:
        return read_classes(named)
    if not request.acceptance.needs_classes():
        return []
    return list(dict.fromkeys(row.label for row in _rows(request) if row.label is not None))


def _with_pictures(request: GenerateRequest, negative: ImagePrompt | None, row: GenerateRow) -> GenerateRow:
    """The row with the pictures of the command line in the place of those that it has not."""
    chosen = request.rows
    if negative is not None and row.negative_prompt is None:
        row = replace(row, negative_prompt=negative)
    image, conditions = row.image or chosen.image, row.conditions or tuple(chosen.condition or ())
    return row if image is None and not conditions else replace(row, image=image, conditions=conditions)


def _check(request: GenerateRequest) -> None:
    """Refuses what needs no model to be refused."""
    chosen, files = request.rows, request.files
    ways = {
        "PROMPT": request.texts,
        "--prompts": chosen.prompts,
        "--template": chosen.template,
        "--image-prompts": chosen.image_prompts,
    }
    said = [name for name, value in ways.items() if value]
    if len(said) != 1:
        told = f"{', '.join(list(ways)[:-1])} or {list(ways)[-1]}"
        raise CommandError(f"got {' and '.join(said) or 'nothing to make'}, expected {told}")
    if chosen.image_prompts is not None and request.acceptance.accept == "clip":
        raise CommandError("--accept clip: given with --image-prompts, which are no texts to compare images with")
    if chosen.negative_image_prompt is not None and request.sampling.negative_prompt is not None:
        raise CommandError("--negative-image-prompt: given with --negative-prompt, expected one of them")
    if chosen.template and not (chosen.class_name or chosen.classes):
        raise CommandError("--template: given without --class or --classes")
    if not chosen.template and (chosen.class_name or chosen.classes):
        raise CommandError("--class: given without --template, whose places it fills")
    if chosen.class_name and chosen.classes:
        raise CommandError("--class: given with --classes, expected one of them")
    if chosen.ignore and chosen.prompts is None:
        raise CommandError("--ignore: given without --prompts, a table")
    nets = len(request.controls.control or [])
    if chosen.condition and len(chosen.condition) != nets:
        raise CommandError(f"--condition: got {len(chosen.condition)} for {nets} --control, expected one each")
    if nets and not chosen.condition and chosen.prompts is None:
        raise CommandError("--control: given without --condition, which the ControlNet is shown")
    for name, files_given in (("--image", [chosen.image]), ("--condition", chosen.condition or [])):
        for file in filter(None, files_given):
            try:
                load_image(file)
            except ImageError as error:
                raise CommandError(f"{name}: {error}") from error
    request.acceptance.check()
    request.workers.check(request.source.device)
    check_layout(files.layout)
    check_format(files.format, files.quality)
    check_folder(request.out)


def _finish(request: GenerateRequest, work: Generation, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Closes the folder, and writes report.html; of several processes the last one does."""
    out = request.out
    if request.workers.engine is None and not all_ended(out, request.workers.share()[1]):
        return {}
    folder = close(out)
    if request.files.report:
        with writing(out), waiting(out, "report"):
            content = _summary({**numbers, "folder": folder}, 0, out)
            settings = read_manifest(out)["settings"]
            content |= {"settings": settings, "versions": versions(), "files": files_of(out)}
            _, code = next(iter(loading(settings).items()))
            with replacing(out / "report.html") as file:
                file.write(render(content, contact_sheet(out), last_timeline(out), code))
    return {"folder": folder}


def contact_sheet(out: Path) -> list[Tile]:
    """The first images of a folder, classes in turn."""
    import pyarrow.compute as pc

    by_class: dict[Any, list[str]] = {}
    for rows in index_shards(out, ["id", "label", "status"]):
        for row in rows.filter(pc.equal(rows["status"], "ok")).to_pylist():
            ids = by_class.setdefault(row["label"], [])
            if len(ids) < _TILES:
                ids.append(row["id"])
    turns = [ids[turn] for turn in range(_TILES) for ids in by_class.values() if turn < len(ids)]
    tiles = []
    for content, row in read_images(out, turns[:_TILES]):
        with Image.open(io.BytesIO(content)) as image:
            image.thumbnail((_SIDE, _SIDE))
            tiles.append(Tile(image.convert("RGB"), row["prompt"], row["seed"]))
    return tiles


def _summary(numbers: Mapping[str, Any] | None, rows: int, out: Path) -> dict[str, Any]:
    hidden = {what: hidden_share(numbers, what) for what in ("encoding", "writing")}
    return {**summary(numbers, rows, out, ["name", "prompt"]), **hidden, "folder": (numbers or {}).get("folder")}
