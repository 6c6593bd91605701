"""Pictures and texts in the space of a model's CLIP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsd_fast.kernels.common.host import own_types
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.prompts import token_limit, tokenize

if TYPE_CHECKING:
    from dsd_fast.models import Model

# Of CLIP (Radford et al. 2021), where a model says nothing else.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Bounds the activations of long lists, as of all classes of a job.
_TEXTS_AT_ONCE = 256


class ClipSpace:
    """Embed pictures and texts with the model's CLIP.

    Pixels are resized to CLIP's input (bicubic, with antialiasing) and normalised with the mean and deviation of the
    preprocessor_config.json beside CLIP's weights, or with those of OpenAI's CLIP.

    Args:
        model: with a `clip`.
        resize: "whole" squeezes the whole picture into CLIP's square; "crop" resizes its shorter side and cuts out the
            centre, as CLIP's own preprocessing does.

    Raises:
        ValueError: another `resize`.
    """

    def __init__(self, model: Model, *, resize: str = "whole") -> None:
        if resize not in ("whole", "crop"):
            raise ValueError(f"resize: got {resize!r}, expected 'whole' or 'crop'")
        self._clip, self._crop = model.clip, resize == "crop"
        self._side = int(self._clip.config.vision_config.image_size)
        mean, std = _statistics(self._clip)
        weight = next(self._clip.parameters())
        self._mean, self._std = (
            upload(torch.tensor(each, dtype=torch.float32, device="cpu"), weight.device).view(1, 3, 1, 1)
            for each in (mean, std)
        )
        self._dtype = weight.dtype
        self._tokenizer = model.tokenizers[0]

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Embed (n, 3, H, W) in [−1, 1] as (n, E) float32 of unit length."""
        with own_types(self._mean.device):
            embeds = self._clip.visual_projection(self._clip.vision_model(self.prepared(pixels)).pooler_output)
        return F.normalize(embeds.float(), dim=-1)

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as (n, E) float32 of unit length; the tokenizer is the model's first, which has CLIP's words.

        Raises:
            ValueError: a text that :meth:`tokens` refuses.
        """
        tokens = self.tokens(texts)
        parts = (tokens[start : start + _TEXTS_AT_ONCE] for start in range(0, len(tokens), _TEXTS_AT_ONCE))
        with own_types(self._mean.device):
            pooled = [self._clip.text_model(upload(part, self._mean.device)).pooler_output for part in parts]
            embeds = self._clip.text_projection(torch.cat(pooled))
        return F.normalize(embeds.float(), dim=-1)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids (n, T) int64 of texts.

        Raises:
            ValueError: a text that is too long, or has learned tokens, which CLIP does not know.
        """
        encoder = self._clip.text_model
        # What follows the end token is not looked at, so the padding does not count.
        tokens, _ = tokenize(self._tokenizer, list(texts), token_limit([self._tokenizer], [encoder]))
        known = int(encoder.config.vocab_size)
        if unknown := [text for text, ids in zip(texts, tokens, strict=True) if int(ids.max()) >= known]:
            raise ValueError(f"texts: {unknown[0][:80]!r} has tokens beyond CLIP's {known}, as learned ones are")
        return tokens

    def prepared(self, pixels: Tensor) -> Tensor:
        """Resize and normalise (n, 3, H, W) in [−1, 1] to what CLIP takes, (n, 3, S, S) in its type."""
        x, side = (upload(pixels, self._mean.device, self._mean.dtype) + 1) / 2, self._side
        height, width = x.shape[-2:]
        size = (side, side)
        if self._crop:
            size = (max(side, side * height // width), max(side, side * width // height))
        if (height, width) != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        return ((x[..., top : top + side, left : left + side] - self._mean) / self._std).to(self._dtype)


def _statistics(clip: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    file = Path(str(clip.name_or_path or "")) / "preprocessor_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        mean, std = (tuple(float(value) for value in config[key]) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError):
        return _MEAN, _STD
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        return _MEAN, _STD
    return mean, std
