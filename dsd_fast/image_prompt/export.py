"""Image prompts of any number of images into a folder, by one or more processes that may die at any moment."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from dsd_fast.engine.fingerprint import text_settings
from dsd_fast.engine.image_prompts import KIND, SUFFIX, ImagePrompt
from dsd_fast.engine.items import COLUMNS, Item, Items, images_of_a_shard, prompt_check
from dsd_fast.images import ImageError, ImageSource
from dsd_fast.jobs import Exported, Job, Row, ShardFiles, fill, stream_tensors

if TYPE_CHECKING:
    from dsd_fast.image_prompt.converter import Conversion

_COLUMNS = {name: kind for name, kind in COLUMNS.items() if name != "seed"}


def convert_to(
    converter: Conversion,
    folder: str | os.PathLike[str],
    images: Iterable[ImageSource],
    prompts: str | Sequence[str] = "",
    alpha: float = 0.0,
    *,
    norm: float | None = None,
    names: Sequence[str] | None = None,
    shard_rows: int = 256,
    worker: int = 0,
    workers: int = 1,
    retry_errors: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Exported:
    """Converts any number of images into files; memory does not grow with them.

    The folder is a job's (:class:`dsd_fast.jobs.Job`): a conversion that was stopped, in whatever way, goes on when it
    is called again. :meth:`ImagePrompt.load` reads all of it as one. The table of :func:`dsd_fast.jobs.read_index` says
    of each row its id, name, status, reason and message of an error, shard, row in the shard, path, prompt, and the
    height and width of the image file. An image that cannot be used, a prompt that is too long where each image has its
    own, and what CLIP makes no finite numbers of ("not-finite") are rows with the status "error".

    Args:
        folder: made if missing.
        images, prompts, alpha, norm: see :meth:`Conversion.edit`; ``alpha`` 0 is :meth:`~.convert`.
        names: of the rows; None: a file's name without its ending, the position of other images. A row's id is made of
            the image's content, the prompt and the name: inputs that are equal in all of them are one row.
        shard_rows: images that become whole files and rows of the index together.
        worker: which of ``workers`` processes this is, from 0. Each image is one worker's, by its id.
        workers: processes that share the images, at once or one after the other; all are given all images.
        retry_errors: whether images that were errors are tried again.
        progress: called with the number of this worker's inputs that are dealt with, now and then.

    Raises:
        JobError: the folder holds other results (names each setting that differs), is being written, or cannot be
            written.
        ValueError: an argument that does not fit, by name.
    """
    converter.check(alpha, norm, prompts if isinstance(prompts, str) else "")
    items = Items(images, prompts, 0, names, prompt_check(converter.model))
    towers = {"vision": converter.vision, "clip_text": converter.model.clip.text_model}
    job = Job(
        folder,
        KIND,
        {
            **text_settings(converter.engine, towers),
            **converter.settings(norm),
            "alpha": float(alpha),
            "prompts": prompts if isinstance(prompts, str) else None,
        },
        write=_write,
        columns=_COLUMNS,
        shard_rows=shard_rows,
        worker=worker,
        workers=workers,
        retry_errors=retry_errors,
    )
    size = converter.preprocessing.crop or converter.model.image_size
    together = images_of_a_shard(shard_rows, converter.config.batch, size)

    def compute(pending: Iterator[Item]) -> Generator[list[ImagePrompt | ImageError]]:
        taken: list[Item] = []

        def sources() -> Iterator[Any]:
            for item in pending:
                taken.append(item)
                # What is unusable goes through as no image, so that its row keeps its place.
                yield item.source if item.refusal is None else None

        chunks = converter.mapped_chunks(sources(), together)
        with closing(cast("Generator[list[Tensor | ImageError]]", chunks)):
            for chunk in chunks:
                own, taken[: len(chunk)] = taken[: len(chunk)], []
                yield _prompts(converter, chunk, own, alpha, norm)

    with job:
        fill(job, items, operator.attrgetter("id"), compute, partial(_settle, job), progress=progress)
    return Exported.of(job)


def _prompts(
    converter: Conversion,
    chunk: list[Tensor | ImageError],
    items: Sequence[Item],
    alpha: float,
    norm: float | None,
) -> list[ImagePrompt | ImageError]:
    usable = [(row, item) for row, item in zip(chunk, items, strict=True) if isinstance(row, Tensor)]
    texts, names = [item.prompt for _, item in usable], [item.name for _, item in usable]
    made: Iterator[ImagePrompt] = iter(())
    if usable:
        made = iter(converter.prompt_of([row for row, _ in usable], texts, alpha, norm=norm, names=names).to("cpu"))
    return [each if isinstance(each, ImageError) else next(made) for each in chunk]


def _settle(job: Job, item: Item, result: ImagePrompt | ImageError) -> None:
    columns = {name: item.columns[name] for name in _COLUMNS}
    if isinstance(result, ImageError):
        reason, message = item.refusal or (result.reason, str(result))
        job.fail(item.id, item.name, reason, message, **columns)
    else:
        job.put(item.id, item.name, result, **columns)


def _write(files: ShardFiles, rows: Sequence[Row]) -> None:
    with files.open(suffix=SUFFIX) as stream:
        stream_tensors(stream, *ImagePrompt.cat([row.payload for row in rows]).content())
