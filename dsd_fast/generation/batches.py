"""Images of batches of columns, for `map_batches` of Ray Data and the like."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsd_fast.engine.batches import Batch, answered, column, images_of, loaded
from dsd_fast.generation.config import GenerateConfig
from dsd_fast.generation.reading import ALIASES, COLUMNS, rows_of
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.generation.sampler import Sampler, to_uint8
from dsd_fast.generation.units import accepted, units_of
from dsd_fast.images import load_image
from dsd_fast.models import Model


class GenerateBatch:
    """Makes an image of each row of a batch: ``dataset.map_batches(GenerateBatch, fn_constructor_kwargs={…}, …)``.

    Args:
        model: what :func:`dsd_fast.load` takes, so that little travels to the processes; or a model.
        load: its other arguments, as {"device": "cuda", "dtype": "bfloat16"}.
        config: settings of :class:`GenerateConfig`.

    Raises:
        ValueError: a setting that is not allowed or does not fit the model, by name.
        ModelError: no such model.
    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str] = "mini",
        *,
        load: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        self.sampler = Sampler(loaded(model, load), GenerateConfig(**config))

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Makes them.

        Args:
            batch: columns of N rows: "prompt", and any of those of a table of rows
                (:data:`dsd_fast.generation.reading.COLUMNS`), of which "image" is the bytes of files or uint8 arrays
                (H, W, C) to start from; others go through.

        Returns:
            The batch, and in the place of its images the new ones, "image": (N, H, W, 3) uint8, an object array of
            them where sizes differ; and "error": a sentence of a row that cannot be used, whose image is black, "" of
            the others.

        Raises:
            ValueError: no column of prompts, or one that is called "error".
        """
        sampler, count = self.sampler, len(column(batch, "prompt"))
        known = {name: batch[name] for name in batch if name in COLUMNS or name in ALIASES}
        if "image" in known:
            known["image"] = images_of(batch)
        rows: dict[int, GenerateRow] = {}
        errors = [""] * count
        for number in range(count):
            try:
                row = next(rows_of({name: _plain(values[number]) for name, values in known.items()}))
                for source in row.sources:
                    load_image(source)
                rows[number] = sampler.resolve(row)
            except ValueError as error:
                errors[number] = str(error).replace("prompts[0]", "the row", 1)
        images = [np.zeros((*sampler.engine.size, 3), np.uint8)] * count
        if rows:
            outcomes = accepted(
                units_of(rows.values()),
                lambda chosen: to_uint8(sampler.pixels(chosen)).cpu().numpy(),
                None,
                batch=min(map(sampler.rows_at_once, rows.values())),
                group=sampler.group,
            )
            for number, outcome in zip(rows, outcomes, strict=True):
                assert outcome.image is not None
                images[number] = outcome.image
        return answered(batch, {"image": _stacked(images)}, errors)


def _plain(value: Any) -> Any:
    """A cell without NumPy's types; an absent one, which a table has as NaN, is None."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and value != value else value


def _stacked(images: Sequence[Any]) -> Any:
    if len({image.shape for image in images}) == 1:
        return np.stack(images)
    found = np.empty(len(images), dtype=object)
    found[:] = images
    return found
