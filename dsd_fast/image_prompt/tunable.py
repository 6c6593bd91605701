"""Images to prompts: the whole converter."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dsd_fast.image_prompt.converter import Conversion
from dsd_fast.image_prompt.export import convert_to
from dsd_fast.image_prompt.files import read, write
from dsd_fast.image_prompt.tune_config import TuneConfig
from dsd_fast.image_prompt.tuning import Tuning, tune
from dsd_fast.images import ImageSource
from dsd_fast.jobs import locked
from dsd_fast.training import Report, reporting

if TYPE_CHECKING:
    from transformers import CLIPModel

    from dsd_fast.models import Model


class ImagePromptConverter(Conversion):
    """:class:`~dsd_fast.image_prompt.converter.Conversion` of any number of images, which can be tuned to images.

    Attributes:
        tuning: how the tuning went; None of a converter that was not tuned, or was loaded.
    """

    tuning: Tuning | None = None

    # What it documents holds for the method too.
    convert_to = convert_to

    def finetune(
        self,
        images: Iterable[ImageSource],
        config: TuneConfig | None = None,
        *,
        validation: Iterable[ImageSource] | None = None,
        out: str | os.PathLike[str] | None = None,
        callback: Report | None = None,
        progress: bool = True,
    ) -> Self:
        """Tune the image encoder and the model to images of a domain, about a hundred (SD-IPC-FT).

        Learned are deep prompts in the image encoder and a LoRA on the keys and values of the UNet's cross-attention,
        by the noise loss of the images with their own converted prompts. This converter and its model stay as they are.

        Args:
            images: to learn from.
            config: the settings; None: the defaults.
            validation: held-out images; the parameters of least loss on them are kept. Without them the last are.
            out: folder for checkpoints, and for the converter at the end, as :meth:`save` writes it. The same call with
                the same folder goes on where a killed process stopped, to the same result; on a GPU as far as its
                kernels repeat themselves.
            callback: called for each step as callback(step, loss, None), on a GPU while the next one is computed, and
                with each record as callback(step, None, record).
            progress: whether a bar with the loss is shown.

        Returns:
            The tuned converter. Its ``model`` is the tuned one, for :func:`dsd_fast.generate`; ``tuning`` tells of the
            training. Another tuning goes on from it.

        Raises:
            FloatingPointError: a loss or a gradient that is no finite number.
            ImageError: an image that cannot be used.
            LockedError: another process tunes into ``out``.
            ValueError: images or settings that are not allowed, by name; an ``out`` of another tuning.
        """
        tune_config, folder = config or TuneConfig(), None if out is None else Path(out)
        with reporting("tuning", tune_config.steps, callback, progress) as report:
            tuned, tuning = tune(self, images, validation, tune_config, folder, report)
        tuned.tuning = tuning
        return tuned

    def customize(
        self,
        images: Iterable[ImageSource],
        steps: int = 30,
        *,
        out: str | os.PathLike[str] | None = None,
        callback: Report | None = None,
        progress: bool = True,
    ) -> Self:
        """Tune to one or a few images in a few steps (SD-IPC-CT): :meth:`finetune` with ``TuneConfig.few(steps)``.

        Args:
            images, out, callback, progress: see :meth:`finetune`.
            steps: of the optimiser.

        Raises:
            FloatingPointError, ImageError, LockedError, ValueError: see :meth:`finetune`.
        """
        return self.finetune(images, TuneConfig.few(steps), out=out, callback=callback, progress=progress)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the settings, and what was learned.

        ``prompt.json``; with a LoRA ``pytorch_lora_weights.safetensors``, which stock diffusers'
        ``pipe.load_lora_weights(folder)`` reads; with whole matrices ``cross_attention.safetensors``; with deep prompts
        ``deep_prompts.safetensors``.

        Raises:
            LockedError: another process writes to the folder.
            OSError: the folder cannot be written.
        """
        with locked(Path(folder)):
            write(Path(folder), self)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], model: Model, clip: CLIPModel | str | os.PathLike[str] | None = None
    ) -> Self:
        """Make the converter that :meth:`save`, :meth:`finetune` or :meth:`customize` has written.

        Args:
            folder: of its files.
            model: that it was made for; it stays as it is.
            clip: see the class.

        Raises:
            ValueError: a folder without them, or of another model's.
            ModelError: a LoRA that does not fit.
        """
        return read(cls, Path(folder), model, clip)
