"""Scores of batches of columns, for `map_batches` of Ray Data and the like."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dsd_fast.engine.batches import Batch, answered, column, images_of, loaded
from dsd_fast.engine.items import prompt_check
from dsd_fast.matching.config import MatchConfig
from dsd_fast.matching.matcher import Matcher
from dsd_fast.matching.pairs import Pairs
from dsd_fast.models import Model


class ScoreBatch:
    """Scores each image of a batch with its caption: ``dataset.map_batches(ScoreBatch, fn_constructor_kwargs={…}, …)``.

    Args:
        model: what :func:`dsd_fast.load` takes, so that little travels to the processes; or a model.
        load: its other arguments, as {"device": "cuda", "dtype": "bfloat16"}.
        adapter: see :class:`Matcher`.
        config: settings of :class:`MatchConfig`.

    Raises:
        ValueError: a setting that is not allowed or does not fit the model, by name.
        ModelError: no such model.
    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str] = "mini",
        *,
        load: Mapping[str, Any] | None = None,
        adapter: str | Sequence[str] | None = None,
        **config: Any,
    ) -> None:
        self.matcher = Matcher(loaded(model, load), MatchConfig(**config), adapter=adapter)
        self._check = prompt_check(self.matcher.model)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Scores them.

        Args:
            batch: columns of N rows: "image", the bytes of files or uint8 arrays (H, W, C); "caption"; others go
                through.

        Returns:
            The batch without its images, "score": (N,) float32, higher is better, and "error": a sentence of a row
            that cannot be used, whose score is NaN, "" of the others.

        Raises:
            ValueError: no column of images or captions, or a column that the answer has too.
        """
        images, captions = images_of(batch), [str(each) for each in column(batch, "caption")]
        errors = ["" if (wrong := self._check(each)) is None else wrong[1] for each in captions]
        pairs, scores = Pairs(), torch.full((len(images),), torch.nan, dtype=torch.float32, device="cpu")
        rows = [number for number, error in enumerate(errors) if not error]
        # Before there are any, two rows may be one pair.
        pair_of = [pairs.pair(images[number], captions[number]) for number in rows]
        image_of = [pairs.image(images[number]) for number in rows]
        if rows:
            found = torch.full((len(pairs),), torch.nan, dtype=torch.float32, device="cpu")
            failed: dict[int, str] = {}
            texts = self.matcher._encode(pairs.texts)
            for _, chosen, parts, refused in pairs.scored(self.matcher._scorer, texts):
                found[chosen] = parts.sum(0).float()
                failed |= {image: str(error) for image, error in refused.items()}
            scores[rows] = found[pair_of]
            for number, image in zip(rows, image_of, strict=True):
                errors[number] = failed.get(image, "")
        return answered(batch, {"score": scores.numpy()}, errors)
