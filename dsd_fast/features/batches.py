"""Features of batches of columns, for `map_batches` of Ray Data and the like."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from dsd_fast.engine.batches import Batch, answered, images_of, loaded
from dsd_fast.engine.items import prompt_check
from dsd_fast.features.extractor import FeatureExtractor
from dsd_fast.features.host import on_host
from dsd_fast.images import ImageError
from dsd_fast.models import Model


class ExtractBatch:
    """Extracts the features of a batch's images: ``dataset.map_batches(ExtractBatch, fn_constructor_kwargs={…}, …)``.

    Args:
        model: what :func:`dsd_fast.load` takes, so that little travels to the processes; or a model.
        load: its other arguments, as {"device": "cuda", "dtype": "bfloat16"}.
        seed: of the noise, where rows have none of their own.
        config: arguments of :class:`FeatureExtractor`.

    Raises:
        ValueError: a setting that is not allowed or does not fit the model, by name.
        ModelError: no such model.
    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str] = "mini",
        *,
        load: Mapping[str, Any] | None = None,
        seed: int = 0,
        **config: Any,
    ) -> None:
        self.extractor = FeatureExtractor(loaded(model, load), **config)
        self.seed = seed
        self._check = prompt_check(self.extractor.model)

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Extracts them.

        Args:
            batch: columns of N rows: "image", the bytes of files or uint8 arrays (H, W, C); perhaps "prompt" and
                "seed"; others go through.

        Returns:
            The batch without its images, id → (N, S, C, h, w) of each feature, and "error": a sentence of a row that
            cannot be used, whose features are NaN, "" of the others. Of bfloat16, which NumPy has not, float32.

        Raises:
            ValueError: no column of images, or a column that the answer has too.
        """
        images: list[Any] = list(images_of(batch))
        prompts = [str(each) for each in batch.get("prompt", [""] * len(images))]
        errors = ["" if (wrong := self._check(each)) is None else wrong[1] for each in prompts]
        for number, error in enumerate(errors):
            if error:
                images[number], prompts[number] = None, ""
        seeds = [int(each) for each in batch["seed"]] if "seed" in batch else None
        wide = torch.float32 if self.extractor._dtype == torch.bfloat16 else self.extractor._dtype
        features = {
            name: torch.full(self.extractor._shape(name, len(images)), torch.nan, dtype=wide, device="cpu")
            for name in self.extractor.layers
        }
        for part, _ in on_host(self.extractor.extract_chunks(images, prompts, self.seed, seeds=seeds)):
            for number, found in part.by_image():
                if isinstance(found, ImageError):
                    errors[number] = errors[number] or str(found)
                    continue
                for name, value in found.items():
                    features[name][number] = value
        return answered(batch, {name: value.numpy() for name, value in features.items()}, errors)
