"""Any number of images into a folder, by one or more processes that may die at any moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dsd_fast.generation.accept import Accept, Judge, NearDuplicates, Verdict, accept_settings, verdicts
from dsd_fast.generation.closing import close
from dsd_fast.generation.encoding import QUALITY, Encoded, Encoder
from dsd_fast.generation.files import KIND, VECTOR, writer_of
from dsd_fast.generation.rows import COLUMNS, GenerateRow, columns, identified, taken
from dsd_fast.generation.sampler import Sampler, to_uint8
from dsd_fast.generation.units import COLUMNS as UNIT_COLUMNS
from dsd_fast.generation.units import NOT_ACCEPTED, Unit, accepted, units_of
from dsd_fast.images import ImageError, Taken, load_image
from dsd_fast.images.batch import ahead
from dsd_fast.jobs import Exported, Job, all_ended, fill
from dsd_fast.kernels.common.transfer import Download, one_behind

# Reading files waits more than it works; rows without any are told by the dozen.
_READERS = 4
_ROWS_READ = 32
# Batches whose source images are being loaded while one is computed.
_LOADERS = 2

_NOT_FINITE = "not-finite"

# Of the configuration, in the JSON of an image, where its row does not say it otherwise.
_SAID = ("steps", "guidance", "negative_prompt", "scheduler")


@dataclass(frozen=True)
class Generated(Exported):
    """What a generation into a folder came to.

    Attributes:
        encode_seconds: spent on encoding images, by all threads together.
        encode_overlap: share of it that went on while images were computed.
        closed: what :func:`~dsd_fast.generation.closing.close` tells of the whole folder; None where another worker is
            still to end, or where the caller closes it.
    """

    encode_seconds: float = 0.0
    encode_overlap: float = 0.0
    closed: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Work:
    """An image to be made: its id, and its unit, whose images are out of their owners' reach."""

    id: str
    unit: Unit


@dataclass(frozen=True)
class _Result:
    """What became of a work: its image, being encoded, or reason and message of an error; the index's columns."""

    columns: Mapping[str, Any]
    sample: Future[Encoded] | None = None
    reason: str = ""
    message: str = ""


@dataclass(eq=False)
class _Window:
    """The works of one shard of a folder, whose results come in any order and leave in theirs."""

    folder: Path
    works: Sequence[_Work]
    results: dict[int, _Result] = field(default_factory=dict)
    left: int = 0

    def fail(self, place: int, reason: str, message: str, **more: Any) -> None:
        """Of a work that has no image."""
        row = self.works[place].unit.attempt(0)
        self.results[place] = _Result({**columns(row, self.folder), **more}, None, reason, message)

    def leave(self) -> list[_Result]:
        """The results that no missing one precedes, each once."""
        start = self.left
        while self.left in self.results:
            self.left += 1
        return [self.results.pop(place) for place in range(start, self.left)]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Rows of a window by their places in it, resolved."""

    window: _Window
    rows: Mapping[int, GenerateRow]

    def first_tries(self) -> list[GenerateRow]:
        """The rows with the seeds of their units' first tries: of a class's images all differ, its row has one."""
        works = self.window.works
        return [replace(row, seed=works[place].unit.attempt(0).seed) for place, row in self.rows.items()]


def generate_to(
    sampler: Sampler,
    rows: Iterable[GenerateRow],
    folder: str | os.PathLike[str],
    *,
    accept: Accept | None = None,
    per_class: int | None = None,
    max_tries: int = 10,
    near_duplicates: float | None = None,
    layout: str = "webdataset",
    format: str = "png",
    quality: int | None = None,
    mark: bool = True,
    shard_rows: int = 256,
    batch: int | None = None,
    worker: int = 0,
    workers: int = 1,
    retry_errors: bool = False,
    closes: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Generated:
    """Makes any number of images into files; memory does not grow with them, but for their ids.

    The folder is a job's (:class:`dsd_fast.jobs.Job`): what was stopped, in whatever way, goes on when it is called
    again, and images that are there are not made again. Its index has each row as it was given, so that an image can be
    made again from its row and the manifest (:func:`dsd_fast.generation.again.again`). A row that the model does not
    take ("refused"), a source image that cannot be used, pixels that are not finite ("not-finite") and a row of which
    no try was accepted ("not-accepted") are rows with the status "error".

    At a fixed ``batch``, and on one machine, the bytes of a shard are a function of its rows: images that are computed
    together are of one shard. With another batch, or other workers, ids and texts are the same, and pixels within one
    level of 256.

    Args:
        rows: consumed as they are needed; rows that are equal are one. With ``per_class`` all are read first.
        folder: made if missing.
        accept: judges images; a row has up to ``max_tries`` of them, see :mod:`dsd_fast.generation.units`. What was
            rejected stands in the index's column "tries".
        per_class: images of each label, see :func:`~dsd_fast.generation.units.units_of`.
        near_duplicates: least cosine by the model's CLIP of tries of one row that are rejected for it, and of images of
            one class that the closing step marks in near_duplicates.parquet.
        layout: "webdataset": tar files; "parquet"; or "folder", a file for each image.
        format, quality, mark: of image files, see :class:`~dsd_fast.generation.encoding.Encoder`.
        shard_rows: rows that become whole files and rows of the index together.
        batch: rows computed together; None: as many as fill a few micro-batches within the memory budget.
        worker: which of ``workers`` processes this is, from 0. Each row is one worker's, by its id.
        workers: processes that share the rows, at once or one after the other; all are given all rows.
        retry_errors: whether rows that were errors are tried again.
        closes: whether the last of the workers to end writes what a folder is given at the end, see
            :func:`~dsd_fast.generation.closing.close`.
        progress: called with the number of this worker's rows that are dealt with, now and then.

    Raises:
        JobError: the folder holds other results (names each setting that differs), is being written, or cannot be
            written.
        ValueError: an argument that does not fit, by name; what :func:`job_settings` refuses.
    """
    for name, value in (("shard_rows", shard_rows), ("batch", batch), ("max_tries", max_tries)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    near = None if near_duplicates is None else NearDuplicates(sampler.model, near_duplicates)
    kinds = {**COLUMNS, **({} if accept is None else UNIT_COLUMNS), **({VECTOR: "binary"} if near else {})}
    settings = job_settings(sampler, layout, format, quality, mark, accept, max_tries, near)
    job = Job(
        folder,
        KIND,
        settings,
        write=writer_of(layout, format, kinds),
        columns=kinds,
        shard_rows=shard_rows,
        worker=worker,
        workers=workers,
        retry_errors=retry_errors,
    )
    about = {"model": settings["model"]}
    about |= {name: value for name in _SAID if (value := settings["config"][name]) is not None}
    # Outside of the job, whose end waits for what is being encoded.
    with Encoder(format, quality, mark=mark, about=about, timeline=job.timeline) as encoder, job:
        making = _Making(job.folder, sampler, encoder, accept, max_tries, near, batch)
        works = _works(units_of(rows, per_class))
        compute = partial(_compute, making=making, shard_rows=shard_rows)
        fill(job, works, lambda work: work.id, compute, partial(_settle, job), progress=progress)
    closed = close(job.folder) if closes and all_ended(job.folder, workers) else None
    line = job.timeline
    encoding = line.seconds("encode"), line.overlap("encode", "compute")
    return Generated(**vars(Exported.of(job)), encode_seconds=encoding[0], encode_overlap=encoding[1], closed=closed)


def job_settings(
    sampler: Sampler,
    layout: str,
    format: str,
    quality: int | None,
    mark: bool,
    accept: Accept | None,
    max_tries: int,
    near: NearDuplicates | None,
) -> dict[str, Any]:
    """All that changes the files, as JSON, but for what the ids hold: the rows.

    Raises:
        ValueError: a ControlNet's condition, or an ``accept``, that has no lasting name; an adapter that is fused into
            the weights.
    """
    return {
        **sampler.settings(),
        "layout": layout,
        "format": format,
        "quality": quality or QUALITY.get(format),
        "mark": mark,
        "accept": accept_settings(accept),
        "max_tries": None if accept is None else max_tries,
        "near_duplicates": near and near.threshold,
        "near_duplicates_by": near and near.settings(),
    }


def _works(units: Iterable[Unit]) -> Iterator[_Work]:
    """The units with their ids; image files are read by threads, a few rows ahead."""
    source = (replace(unit, row=taken(unit.row)) for unit in units)
    parts = iter(lambda: list(islice(source, _ROWS_READ)), [])
    for works in ahead(_identified, parts, workers=_READERS, read_ahead=_READERS, name="dsd-read"):
        yield from works


def _identified(units: Sequence[Unit]) -> list[_Work]:
    works = []
    for unit in units:
        name, first = identified(unit.attempt(0))
        works.append(_Work(name, replace(unit, row=replace(first, seed=unit.row.seed))))
    return works


def _compute(pending: Iterator[_Work], *, making: _Making, shard_rows: int) -> Generator[list[_Result]]:
    """The results of the pending works, in their order, as soon as none is missing before them."""
    windows = iter(lambda: _Window(making.folder, list(islice(pending, shard_rows))), None)
    batches = making.batches(takewhile(lambda window: window.works, windows))
    # A judge's batch is a whole window, of which the tries load a few images at a time.
    loading = partial(_loaded, held=making.accept is None)
    loaded = ahead(loading, batches, workers=_LOADERS, read_ahead=_LOADERS, name="dsd-decode")
    # Nothing goes on loading when the job ends early.
    with closing(cast("Generator[_Batch]", loaded)):
        for window in making.made(loaded):
            yield window.leave()


def _loaded(batch: _Batch, held: bool) -> _Batch:
    """The batch without the rows of which an image cannot be used: the others stay together.

    Args:
        held: whether their images stay in memory.
    """
    rows = {}
    for place, row in batch.rows.items():
        try:
            image = None if row.image is None else Taken(load_image(row.image))
            conditions = tuple(Taken(load_image(source)) for source in row.conditions)
        except ImageError as error:
            batch.window.fail(place, error.reason, str(error))
        else:
            rows[place] = replace(row, image=image, conditions=conditions) if held else row
    return _Batch(batch.window, rows)


def _settle(job: Job, work: _Work, result: _Result) -> None:
    name = work.unit.row.name
    if result.sample is None:
        job.fail(work.id, name, result.reason, result.message, **result.columns)
    else:
        job.put(work.id, name, result.sample, **result.columns)


@dataclass(frozen=True)
class _Making:
    """How the images of windows are made."""

    folder: Path
    sampler: Sampler
    encoder: Encoder
    accept: Accept | None
    max_tries: int
    near: NearDuplicates | None
    batch: int | None

    def together(self, row: GenerateRow) -> int:
        return self.batch or self.sampler.rows_at_once(row)

    def batches(self, windows: Iterable[_Window]) -> Iterator[_Batch]:
        """The rows of windows that can be made, those of one group together; with a judge all of a window.

        Of each window at least one batch, perhaps without rows.
        """
        for window in windows:
            groups: dict[Hashable, dict[int, GenerateRow]] = {}
            for place, work in enumerate(window.works):
                try:
                    row = self.sampler.resolve(work.unit.row)
                    assert row.size is not None
                    self.encoder.check_size(row.size)
                    if isinstance(self.accept, Judge):
                        self.accept.check(row)
                except ValueError as error:
                    window.fail(place, "refused", str(error))
                else:
                    groups.setdefault(self.sampler.group(row) if self.accept is None else None, {})[place] = row
            for rows in groups.values():
                together = self.together(next(iter(rows.values()))) if self.accept is None else len(rows)
                for start in range(0, len(rows), together):
                    yield _Batch(window, dict(islice(rows.items(), start, start + together)))
            if not groups:
                yield _Batch(window, {})

    def made(self, batches: Iterable[_Batch]) -> Iterator[_Window]:
        """Gives each batch's window when the batch's results are there."""
        if self.accept is not None:
            for batch in batches:
                yield from self._accepted(batch)
            return
        # From a GPU the images of a batch are copied beside the computation of the next one.
        for batch, copy in one_behind((batch, self._begun(batch.first_tries())) for batch in batches):
            images, finite = _on_host(copy)
            vectors = self.near.vectors(images) if self.near and len(images) else [None] * len(images)
            for place, image, good, vector in zip(batch.rows, images, finite, vectors, strict=True):
                work = batch.window.works[place]
                if good:
                    batch.window.results[place] = self._encoded(work, work.unit.attempt(0), image, vector)
                else:
                    message = "the image has pixels that are no finite numbers, which dtype float32 may avoid"
                    batch.window.fail(place, _NOT_FINITE, message)
            yield batch.window

    def _accepted(self, batch: _Batch) -> Iterator[_Window]:
        """Makes tries of a window's works until each has one that is accepted."""
        finite: list[bool] = []

        def make(rows: Sequence[GenerateRow]) -> npt.NDArray[np.uint8]:
            images, finite[:] = _on_host(self._begun(rows))
            return images

        def accept(images: npt.NDArray[np.uint8], rows: Sequence[GenerateRow]) -> list[Verdict]:
            judged = verdicts(self.accept, images, rows)
            return [each if good else Verdict(False, _NOT_FINITE) for each, good in zip(judged, finite, strict=True)]

        window, places = batch.window, sorted(batch.rows)
        units = [replace(window.works[place].unit, row=batch.rows[place]) for place in places]
        outcomes = accepted(
            units,
            make,
            accept,
            batch=min(
                map(self.together, {self.sampler.group(unit.row): unit.row for unit in units}.values()), default=1
            ),
            max_tries=self.max_tries,
            near=self.near,
            group=self.sampler.group,
        )
        yield window
        for place, outcome in zip(places, outcomes, strict=True):
            if outcome.row is None or outcome.image is None:
                window.fail(place, NOT_ACCEPTED, outcome.message, **outcome.columns)
            else:
                work = window.works[place]
                row = replace(work.unit.row, seed=outcome.row.seed)
                window.results[place] = self._encoded(work, row, outcome.image, outcome.vector, **outcome.columns)
            yield window

    def _begun(self, rows: Sequence[GenerateRow]) -> Download:
        if not rows:
            return Download({})
        pixels = self.sampler.pixels(rows)
        return Download({"images": to_uint8(pixels), "finite": pixels.isfinite().flatten(1).all(1)})

    def _encoded(
        self, work: _Work, row: GenerateRow, image: npt.NDArray[np.uint8], vector: Any, **more: Any
    ) -> _Result:
        if vector is not None:
            more[VECTOR] = vector.astype(np.float16).tobytes()
        said = columns(row, self.folder)
        # Not what it was judged by, whose last digits are the batch's.
        sample = self.encoder.submit(image, {"id": work.id, "name": row.name, **said})
        return _Result({**said, **more}, sample)


def _on_host(copy: Download) -> tuple[npt.NDArray[np.uint8], list[bool]]:
    """(n, H, W, 3) images of 8 bits, and whether all values of each were finite."""
    arrived = copy.done()
    if not arrived:
        return np.empty((0, 1, 1, 3), np.uint8), []
    return arrived["images"].numpy(), arrived["finite"].tolist()
