"""Batches of columns, as Ray Data and others hand them to a class that is made once in each of their processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dsd_fast.images import ImageError, ImageSource, Taken, load_bytes
from dsd_fast.models import Model, load

if TYPE_CHECKING:
    import numpy.typing as npt

Batch = Mapping[str, Any]


def loaded(model: Model | str | os.PathLike[str], options: Mapping[str, Any] | None) -> Model:
    """A model itself, or what :func:`dsd_fast.load` makes of its name and the options.

    Raises:
        ValueError: options beside a model that is loaded.
        ModelError: no such model.
    """
    if not isinstance(model, Model):
        return load(model, **(options or {}))
    if options:
        raise ValueError(f"load: got {', '.join(options)} beside a model that is loaded, expected none")
    return model


def column(batch: Batch, name: str) -> Any:
    """A column that must be there.

    Raises:
        ValueError: it is not.
    """
    if name not in batch:
        raise ValueError(f"batch: has no column {name!r}, expected it among {', '.join(batch)}")
    return batch[name]


def images_of(batch: Batch) -> list[ImageSource]:
    """The column "image": the bytes of files, or arrays; what cannot be decoded is told where the image is used.

    Raises:
        ValueError: no such column, or bytes in an array of NumPy's own type for them, which drops zeros at their end.
    """
    values = column(batch, "image")
    if getattr(values, "dtype", None) is not None and values.dtype.kind == "S":
        raise ValueError(
            f"batch: the column 'image' is of dtype {values.dtype}, expected object for the bytes of files"
        )
    return [_source(value, number) for number, value in enumerate(values)]


def _source(value: Any, number: int) -> ImageSource:
    if not isinstance(value, bytes):
        # None and other things are an error of their row.
        return value  # type: ignore[no-any-return]
    try:
        return Taken(load_bytes(value, f"image {number} of the batch"))
    except ImageError as error:
        return Taken(error)


def answered(batch: Batch, columns: Mapping[str, npt.NDArray[Any]], errors: list[str]) -> dict[str, Any]:
    """The batch without its images, with the columns of the answer, and what is wrong with each row ("" of a good one).

    Raises:
        ValueError: a column of the answer that the batch has already.
    """
    kept = {name: value for name, value in batch.items() if name != "image"}
    answer = {**columns, "error": np.array(errors, dtype=object)}
    if kept.keys() & answer.keys():
        raise ValueError(f"batch: has {', '.join(sorted(kept.keys() & answer.keys()))}, which the answer has too")
    return {**kept, **answer}
