"""Scores of any number of images with given captions into a folder, by processes that may die at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dsd_fast.engine import ImagePrompt
from dsd_fast.engine.encoding import Prompt
from dsd_fast.engine.fingerprint import model_settings
from dsd_fast.engine.items import COLUMNS, Item, Items, images_of_a_shard, prompt_check
from dsd_fast.images import ImageError, ImageSource
from dsd_fast.jobs import Exported, Job, fill, row_id, tensors_hash
from dsd_fast.jobs.filling import Parts

if TYPE_CHECKING:
    from dsd_fast.matching.matcher import Matcher

KIND = "matching"

_COLUMNS = {name: COLUMNS[name] for name in ("path", "height", "width")}

# What a process that dies loses is at most a shard, and what a reader holds is one of each worker.
_MOST_ROWS = 256
_SHARD_BYTES = 4 << 20

# So many stand in the manifest as they are, of more their number and what they hash to.
_CAPTIONS = 16


def score_to(
    matcher: Matcher,
    folder: str | os.PathLike[str],
    images: Iterable[ImageSource],
    captions: Sequence[Prompt] | ImagePrompt,
    *,
    names: Sequence[str] | None = None,
    shard_rows: int | None = None,
    worker: int = 0,
    workers: int = 1,
    retry_errors: bool = False,
    progress: Callable[[int], None] | None = None,
    seen: Callable[[str], None] | None = None,
    until: Callable[[Parts[Any]], Parts[Any]] = iter,
) -> Exported:
    """Scores any number of images with all captions into files; memory does not grow with them.

    The folder is a job's (:class:`dsd_fast.jobs.Job`): what was stopped, in whatever way, goes on when it is called
    again, and images whose scores are there are not scored again. A row of :func:`dsd_fast.jobs.read_index` is an
    image: id, name, status, reason and message of an error, path, height and width of the image file, and "scores", a
    list of M float32 in the captions' order, higher is better; null of an error. An image that cannot be used, and one
    with scores that are not finite ("not-finite"), are rows with the status "error".

    Args:
        folder: made if missing.
        images: see :meth:`Matcher.score`; consumed as they are needed.
        captions: M strings, or images as prompts, see :meth:`Matcher.score`; part of the job's settings.
        names: of the rows; None: a file's name without its ending, the position of other images. A row's id is made of
            the image's content and the name: inputs that are equal in both are one row.
        shard_rows: images whose rows are written together; None: 256, or as many as have 4 MiB of scores.
        worker: which of ``workers`` processes this is, from 0. Each image is one worker's, by its id.
        workers: processes that share the images, at once or one after the other; all are given all images.
        retry_errors: whether images that were errors are tried again.
        progress: called with the number of this worker's inputs that are dealt with, now and then.
        seen: called with the id of each input, in their order, those of other workers among them.
        until: see :func:`dsd_fast.jobs.fill`.

    Raises:
        JobError: the folder holds other results (names each setting that differs), is being written, or cannot be
            written.
        ValueError: an argument that does not fit, by name; captions that are neither, or too long.
    """
    if shard_rows is not None and shard_rows < 1:
        raise ValueError(f"shard_rows: got {shard_rows}, expected at least 1")
    texts, scorer = matcher._encode(captions), matcher._scorer
    rows = shard_rows or 1 << (max(1, min(_MOST_ROWS, _SHARD_BYTES // (4 * len(texts)))).bit_length() - 1)
    # A budget that holds no row is told before there is a folder.
    together = images_of_a_shard(rows, scorer.images_together(texts, len(texts)), scorer.engine.size)
    items = Items(images, "", matcher.config.seed, names, prompt_check(matcher.model))

    def key(item: Item) -> str:
        if seen is not None:
            seen(item.id)
        return item.id

    def compute(pending: Iterator[Item]) -> Generator[list[Tensor | ImageError]]:
        with closing(matcher._scores((item.source for item in pending), texts, together=together)) as scores:
            for _, result in scores:
                yield [result]

    job = Job(
        folder,
        KIND,
        job_settings(matcher, captions),
        columns=_columns(),
        shard_rows=rows,
        worker=worker,
        workers=workers,
        retry_errors=retry_errors,
    )
    with job:
        fill(job, items, key, compute, partial(_settle, job), progress=progress, until=until)
    return Exported.of(job)


def job_settings(matcher: Matcher, captions: Sequence[Prompt] | ImagePrompt) -> dict[str, Any]:
    """All that changes the scores, as JSON, but for the images and their names.

    Raises:
        ValueError: an adapter that is fused into the weights, or another change of the model that has no lasting name.
    """
    scorer = matcher._scorer
    config = asdict(matcher.config)
    del config["memory_budget"]
    return {
        **model_settings(scorer.engine),
        **config,
        "timesteps": matcher.timesteps,
        "layers": {name: weights.tolist() for name, weights in matcher.layers.items()},
        "image_size": list(scorer.engine.size),
        "learned_prompt": None if scorer.prompt is None else tensors_hash({"prompt": scorer.prompt}),
        "captions": _told(captions),
    }


def _told(captions: Sequence[Prompt] | ImagePrompt) -> Any:
    """Captions as JSON, of many a hash."""
    told = [each if isinstance(each, str) else {"image_prompt": each.ids[0]} for each in captions]
    if len(told) <= _CAPTIONS:
        return told
    return {"count": len(told), "hash": row_id(*(each if isinstance(each, str) else json.dumps(each) for each in told))}


def _columns() -> dict[str, Any]:
    import pyarrow as pa

    return {**_COLUMNS, "scores": pa.list_(pa.float32())}


def _settle(job: Job, item: Item, result: Tensor | ImageError) -> None:
    columns = {name: item.columns[name] for name in _COLUMNS}
    if isinstance(result, ImageError):
        job.fail(item.id, item.name, result.reason, str(result), **columns)
    elif bad := int((~result.isfinite()).sum()):
        name = columns["path"] or item.name
        message = f"{name} has {bad} scores that are no finite numbers, which dtype float32 may avoid"
        job.fail(item.id, item.name, "not-finite", message, **columns)
    else:
        job.put(item.id, item.name, scores=result.numpy(), **columns)
