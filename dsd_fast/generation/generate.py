"""Any number of images from texts, as pictures or into a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from PIL import Image

from dsd_fast.generation.accept import Accept
from dsd_fast.generation.config import GenerateConfig
from dsd_fast.generation.export import Generated, generate_to
from dsd_fast.generation.reading import Prompts, Seeds, rows_of
from dsd_fast.generation.rows import GenerateRow, taken
from dsd_fast.generation.sampler import Sampler, to_uint8
from dsd_fast.generation.units import accepted, units_of
from dsd_fast.models.controlnet import Control
from dsd_fast.models.tokens import TokenSource

if TYPE_CHECKING:
    from dsd_fast.models import Model


@overload
def generate(
    model: Model,
    prompts: Prompts,
    config: GenerateConfig | None = None,
    *,
    out: None = None,
    seeds: Seeds | None = None,
    tokens: TokenSource | None = None,
    accept: Accept | None = None,
    per_class: int | None = None,
    max_tries: int = 10,
    controls: Sequence[Control] = (),
) -> Iterator[Image.Image]: ...


@overload
def generate(
    model: Model,
    prompts: Prompts,
    config: GenerateConfig | None = None,
    *,
    out: str | os.PathLike[str],
    seeds: Seeds | None = None,
    tokens: TokenSource | None = None,
    accept: Accept | None = None,
    per_class: int | None = None,
    max_tries: int = 10,
    resume: bool = True,
    controls: Sequence[Control] = (),
    **files: Any,
) -> Generated: ...


def generate(
    model: Model,
    prompts: Prompts,
    config: GenerateConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    seeds: Seeds | None = None,
    tokens: TokenSource | None = None,
    accept: Accept | None = None,
    per_class: int | None = None,
    max_tries: int = 10,
    resume: bool = True,
    controls: Sequence[Control] = (),
    **files: Any,
) -> Iterator[Image.Image] | Generated:
    """Make an image of each row; no safety checker runs.

    Args:
        model: from :func:`dsd_fast.load` or :func:`dsd_fast.from_pipeline`.
        prompts: a text or texts, images as prompts, rows, or a file of them, see
            :func:`dsd_fast.generation.reading.rows_of`; consumed as they are needed.
        config: what rows do not say themselves; None: its defaults.
        out: a folder to fill, see :func:`dsd_fast.generation.export.generate_to`.
        seeds: of the rows, see :func:`~dsd_fast.generation.reading.rows_of`.
        tokens: learned tokens that prompts may name, see :meth:`dsd_fast.models.Model.with_tokens`.
        accept: judges images; a row has up to ``max_tries`` of them, see :mod:`dsd_fast.generation.accept`.
        per_class: images of each label, see :func:`~dsd_fast.generation.units.units_of`.
        resume: whether to go on with what the folder has; else it must be empty.
        controls: ControlNets, to which rows give a condition each, or none.
        files: how files are written, arguments of :func:`~dsd_fast.generation.export.generate_to`.

    Returns:
        Without ``out`` pictures in the rows' order, made as they are asked for, some batches at a time; of a row
        without an accepted try there is none. With ``out`` what came of the folder.

    Raises:
        ValueError: an argument, a row or a setting that does not fit, by name; of a row when it is reached.
        ImageError: a source image that cannot be used, when it is reached; with ``out`` it is an error row.
        JobError: of the folder, see :func:`~dsd_fast.generation.export.generate_to`.
    """
    if out is None and (files or not resume):
        name = next(iter(files), "resume")
        raise ValueError(f"{name}: got {files.get(name, resume)!r} without out, the folder that it is about")
    if out is not None and not resume and Path(out).exists() and next(Path(out).iterdir(), None) is not None:
        raise ValueError(f"out: {os.fspath(out)!r} is not empty, expected a new folder where resume is False")
    sampler = Sampler(model if tokens is None else model.with_tokens(tokens), config, controls=controls)
    rows = rows_of(prompts, seeds)
    if out is not None:
        return generate_to(sampler, rows, out, accept=accept, per_class=per_class, max_tries=max_tries, **files)
    return _pictures(sampler, rows, accept, per_class, max_tries)


def _pictures(
    sampler: Sampler, rows: Iterable[GenerateRow], accept: Accept | None, per_class: int | None, max_tries: int
) -> Iterator[Image.Image]:
    resolved = (sampler.resolve(taken(row)) for row in rows)
    first = next(resolved, None)
    if first is None:
        return
    outcomes = accepted(
        units_of(chain([first], resolved), per_class),
        lambda batch: to_uint8(sampler.pixels(batch)).cpu().numpy(),
        accept,
        batch=sampler.rows_at_once(first),
        max_tries=max_tries,
        group=sampler.group,
    )
    for outcome in outcomes:
        if outcome.image is not None:
            yield Image.fromarray(outcome.image)
