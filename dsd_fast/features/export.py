"""Features of any number of images into a folder, by one or more processes that may die at any moment."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import starmap
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from dsd_fast.engine.fingerprint import model_settings, scheduler_settings
from dsd_fast.engine.items import COLUMNS, Item, Items, Names, images_of_a_shard, prompt_check
from dsd_fast.features.export_layouts import LAYOUTS, writer_of
from dsd_fast.features.extraction import Extracted, Extraction
from dsd_fast.features.host import on_host
from dsd_fast.images import ImageError, ImageSource
from dsd_fast.jobs import Exported, Job, fill, read_index, tensors_hash

if TYPE_CHECKING:
    from dsd_fast.features.technique import Technique

KIND = "features"

# Of an image: its features, what refuses it, or None for features that are no finite numbers.
_Result = dict[str, Tensor] | ImageError | None

# A shard is held up to three times: being filled, waiting and being written.
_SHARD_BYTES = 64 << 20
_BUDGET_SHARE = 16
_MOST_ROWS = 4096
_SEEDS = 1 << 32


def extract_to(
    extractor: Extraction,
    folder: str | os.PathLike[str],
    images: Iterable[ImageSource],
    prompts: str | Sequence[str] = "",
    seed: int = 0,
    *,
    names: Sequence[str] | None = None,
    layout: str = "shards",
    shard_rows: int | None = None,
    worker: int = 0,
    workers: int = 1,
    retry_errors: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Exported:
    """Extracts the features of any number of images into files; memory does not grow with them.

    The folder is a job's (:class:`dsd_fast.jobs.Job`): an extraction that was stopped, in whatever way, goes on when it
    is called again, and images whose features are there are not extracted again. The table of
    :func:`dsd_fast.jobs.read_index` says of each row its id, name, status, reason and message of an error, shard, row
    in the shard, path, prompt, seed, and the height and width of the image file. An image that cannot be used, a prompt
    that is too long for the text encoders where each image has its own, and features that are not finite ("not-finite")
    are rows with the status "error". A file that was damaged and is mended has another content, and so another row:
    that of the error stays beside it.

    Args:
        folder: made if missing.
        images: see :meth:`FeatureExtractor.extract`; consumed as they are needed.
        prompts: one for all, or one each; a technique's own prompts go before them.
        seed: of the noise, 0 ≤ seed < 2**32.
        names: of the rows, and of their files in the ".npy" layouts, where "a/b" makes a folder; None: a file's name
            without its ending, the position of other images. A row's id is made of the image's content, the prompt, the
            seed and the name: inputs that are equal in all of them are one row.
        layout: "shards": shards/<shard>.safetensors, id → (rows, S, C, h, w), of which the index gives each image's
            shard and row. Or, as the official extract_feature.py writes them, "npy-layer": <layer>/<name>.npy,
            "npy-sample": <name>/<layer>.npy, (S, C, h, w); "npy-aggregated": <name>.npy, (S, sum of C, H, W), all maps
            enlarged (nearest) to the largest, which attention maps over tokens ("…-map") cannot be. Of one timestep
            these arrays have no axis for it.
        shard_rows: images that become whole files and rows of the index together; None: as many as have 64 MiB, or a
            sixteenth of the extractor's memory budget.
        worker: which of ``workers`` processes this is, from 0. Each image is one worker's, by its id.
        workers: processes that share the images, at once or one after the other; all are given all images.
        retry_errors: whether images that were errors are tried again.
        progress: called with the number of this worker's inputs that are dealt with, now and then.

    Raises:
        JobError: the folder holds other results (names each setting that differs), is being written, or cannot be
            written.
        ValueError: an argument that does not fit, by name; two images of one name in a layout of files; a ControlNet's
            condition that another process could not tell from others, as a lambda.
    """
    check_layout(layout)
    maps = [layer for layer in extractor.layers if layer.endswith("-map")]
    if layout == "npy-aggregated" and maps:
        raise ValueError(
            f"layout: got {layout!r}, whose maps have a picture's positions, for attention maps over tokens "
            f"({', '.join(maps)}); expected another layout"
        )
    if shard_rows is not None and shard_rows < 1:
        raise ValueError(f"shard_rows: got {shard_rows}, expected at least 1")
    seed = _checked(seed)
    technique = extractor.technique
    if technique.prompts is not None:
        # They count all images, and the extractor sees the pending ones alone.
        prompts = technique.prompts
        technique = replace(technique, prompts=None)
    check = prompt_check(extractor.model)
    if isinstance(prompts, str) and (wrong := check(prompts)) is not None:
        raise ValueError(f"prompts: {wrong[1]}")
    items = Items(images, prompts, seed, names, check)
    rows = shard_rows or _rows_of_a_shard(extractor)
    job = Job(
        folder,
        KIND,
        job_settings(extractor, technique, prompts, seed, layout),
        write=writer_of(layout, len(extractor.timesteps), {"timesteps": list(extractor.timesteps)}),
        columns=COLUMNS,
        shard_rows=rows,
        worker=worker,
        workers=workers,
        retry_errors=retry_errors,
    )
    with job:
        taken: dict[str, str] = {}
        if layout != "shards":
            found = read_index(folder, ["name"])
            whole = zip(*(found[name].to_pylist() for name in ("name", "id", "status")), strict=True)
            taken = {name: row for name, row, status in whole if status == "ok"}
        key = Names(taken).check if layout != "shards" else operator.attrgetter("id")
        # Grows as the images are taken, ahead of what asks for the text of one.
        texts: list[str] = []

        def sources(pending: Iterator[Item]) -> Iterator[Any]:
            for item in pending:
                if not isinstance(prompts, str):
                    texts.append(item.prompt)
                # What is unusable goes through as no image, so that its row keeps its place.
                yield item.source if item.refusal is None else None

        def compute(pending: Iterator[Item]) -> Generator[list[_Result]]:
            together = images_of_a_shard(rows, extractor.images_at_once(technique), extractor.size)
            request = prompts if isinstance(prompts, str) else texts
            chunks = extractor.extract_chunks(sources(pending), request, seed, techniques=[technique], chunk=together)
            with closing(cast("Generator[Extracted]", chunks)):
                yield from starmap(_results, on_host(chunks))

        fill(job, items, key, compute, partial(_settle, job), progress=progress)
    return Exported.of(job)


def check_layout(layout: str) -> None:
    """Refuses a layout that there is not.

    Raises:
        ValueError: it is none.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")


def job_settings(
    extractor: Extraction, technique: Technique, prompts: str | Sequence[str], seed: int, layout: str
) -> dict[str, Any]:
    """All that changes the files, as JSON, but for what the ids hold: the images, their names, prompts of their own.

    Raises:
        ValueError: a ControlNet's condition that has no lasting name; an adapter that is fused into the weights.
    """
    config = extractor.settings()
    return {
        **model_settings(extractor.engine.under(technique.adapter, technique.controls)),
        "scheduler": scheduler_settings(extractor.model) if config["official_timesteps"] else {},
        **config,
        "technique": {**config["technique"], "prompts": None},
        "prompts": prompts if isinstance(prompts, str) else None,
        "pca": {
            name: tensors_hash({"mean": pca.mean, "components": pca.components}) for name, pca in extractor.pca.items()
        },
        "seed": seed,
        "layout": layout,
    }


def _checked(seed: int) -> int:
    """The seed as a Python integer."""
    try:
        value = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        value = -1
    if not 0 <= value < _SEEDS:
        raise ValueError(f"seed: got {seed!r}, expected an integer from 0 to 2**32 - 1")
    return value


def _results(part: Extracted, finite: Sequence[bool]) -> list[_Result]:
    """What the images of a chunk gave, in their order."""
    all_finite = iter(finite)
    return [each if isinstance(each, ImageError) else each if next(all_finite) else None for _, each in part.by_image()]


def _settle(job: Job, item: Item, result: _Result) -> None:
    if isinstance(result, ImageError):
        reason, message = item.refusal or (result.reason, str(result))
        job.fail(item.id, item.name, reason, message, **item.columns)
    elif result is None:
        message = f"{item.name} has features that are no finite numbers, which dtype float32 may avoid"
        job.fail(item.id, item.name, "not-finite", message, **item.columns)
    else:
        job.put(item.id, item.name, result, **item.columns)


def _rows_of_a_shard(extractor: Extraction) -> int:
    """A power of two, which the images extracted together divide."""
    config = extractor.config
    dtype = extractor.model.dtype if config.dtype is None else getattr(torch, config.dtype)
    values = sum(math.prod(shape) for shape in extractor.shapes.values())
    row = values * len(extractor.timesteps) * (config.draws if config.keep_draws else 1) * dtype.itemsize
    budget = config.memory_budget
    size = _SHARD_BYTES if budget is None else min(_SHARD_BYTES, budget // _BUDGET_SHARE)
    return 1 << (max(1, min(_MOST_ROWS, size // row)).bit_length() - 1)
