"""Pictures and texts in the space of a model's CLIP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsd_fast.engine.network import PixelNetwork, wide
from dsd_fast.engine.preprocessing import Picture, Preprocessing, as_said
from dsd_fast.engine.templates import filled
from dsd_fast.jobs import row_id, weights_hash
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

    Pixels are resized to CLIP's input (bicubic, with antialiasing) and normalised, by the mean and deviation that an
    image processor's config beside CLIP's weights has, or by those of OpenAI's CLIP.

    Args:
        model: with a `clip`.
        resize: "whole" squeezes the whole picture into CLIP's square; "crop" is CLIP's own preprocessing, which resizes
            the shorter side and cuts out the centre.

    Raises:
        ValueError: another `resize`; an image processor's config that cannot be followed.
    """

    def __init__(self, model: Model, *, resize: str = "whole") -> None:
        if resize not in ("whole", "crop"):
            raise ValueError(f"resize: got {resize!r}, expected 'whole' or 'crop'")
        self._clip = model.clip
        preprocessing = own_preprocessing(self._clip)
        if resize == "whole":
            side = int(self._clip.config.vision_config.image_size)
            preprocessing = replace(preprocessing, size=(side, side), resample="bicubic")
        self.vision = PixelNetwork(self._clip, preprocessing, self._embed)
        self._tokenizer = model.tokenizers[0]

    @property
    def scale(self) -> Tensor:
        """What CLIP multiplies cosines with."""
        scale: Tensor = wide(self._clip.logit_scale.detach()).exp()
        return scale

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Embed (n, 3, H, W) in [−1, 1] as (n, E) float32 of unit length; differentiable."""
        return self.vision(pixels)

    def of_images(self, images: Sequence[Picture]) -> Tensor:
        """Embed n pictures (H, W, 3) of 8 bits as (n, E) float32 of unit length."""
        return self.vision.of_images(images)

    @torch.no_grad()
    def of_classes(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embed names of classes as (n, E) float32 of unit length: the mean over texts with a place for the name.

        Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.4.

        Raises:
            ValueError: a text that :meth:`tokens` refuses.
        """
        texts = self.of_texts([filled(template, name) for name in classes for template in templates])
        return F.normalize(texts.view(len(classes), len(templates), -1).mean(1), dim=-1)

    def settings(self) -> dict[str, Any]:
        """Tell what of the model's CLIP changes embeddings, as JSON."""
        return {
            "weights": weights_hash([self._clip]),
            "tokenizer": row_id(json.dumps(self._tokenizer.get_vocab(), sort_keys=True)),
        }

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as (n, E) float32 of unit length; the tokenizer is the model's first, which has CLIP's words.

        Raises:
            ValueError: a text that :meth:`tokens` refuses.
        """
        states = self.text_states(texts)
        with own_types(self.vision.device):
            embeds = self._clip.text_projection(states)
        return F.normalize(wide(embeds), dim=-1)

    def text_states(self, texts: Sequence[str]) -> Tensor:
        """Give the states (n, E) at texts' ends, in CLIP's own type, before they are projected.

        Raises:
            ValueError: a text that :meth:`tokens` refuses.
        """
        tokens = self.tokens(texts)
        parts = (tokens[start : start + _TEXTS_AT_ONCE] for start in range(0, len(tokens), _TEXTS_AT_ONCE))
        with own_types(self.vision.device):
            return torch.cat([self._clip.text_model(upload(part, self.vision.device)).pooler_output for part in parts])

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids (n, T) int64 of texts, T those of the longest.

        Raises:
            ValueError: a text that is too long, or has learned tokens, which CLIP does not know.
        """
        encoder = self._clip.text_model
        tokens, mask = tokenize(self._tokenizer, list(texts), token_limit([self._tokenizer], [encoder]))
        known = int(encoder.config.vocab_size)
        if unknown := [text for text, ids in zip(texts, tokens, strict=True) if int(ids.max()) >= known]:
            raise ValueError(f"texts: {unknown[0][:80]!r} has tokens beyond CLIP's {known}, as learned ones are")
        # What follows the end token is not looked at.
        return tokens[:, : int(mask.sum(1).max())] if len(tokens) else tokens

    def _embed(self, prepared: Tensor) -> Tensor:
        return F.normalize(wide(self._clip.visual_projection(self._clip.vision_model(prepared).pooler_output)), dim=-1)


def own_preprocessing(clip: Any) -> Preprocessing:
    """Tell what the config of an image processor beside CLIP's weights says, and where it is silent CLIPImageProcessor.

    Raises:
        ValueError: a file that says something else, or is none.
    """
    side = int(clip.config.vision_config.image_size)
    said: dict[str, Any] = {"size": side, "crop_size": side, "resample": 3, "image_mean": _MEAN, "image_std": _STD}
    said |= {f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize")} | {
        "rescale_factor": 1 / 255
    }
    # Since version 5 transformers saves a whole processor in one file, which goes before the other.
    folder = Path(str(clip.name_or_path or ""))
    file = folder / "processor_config.json"
    try:
        own = json.loads(file.read_text(encoding="utf-8")).get("image_processor") if file.is_file() else None
        if own is None:
            file = folder / "preprocessor_config.json"
            own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        said |= own
        # As files of earlier versions have them.
        if isinstance(said["size"], int):
            said["size"] = {"shortest_edge": said["size"]}
        if isinstance(said["crop_size"], int):
            said["crop_size"] = {"height": said["crop_size"], "width": said["crop_size"]}
        preprocessing = as_said(said, str(file))
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as the config of an image processor: {error}") from error
    if (preprocessing.crop or preprocessing.size) != (side, side):
        raise ValueError(
            f"{file} makes pictures of {preprocessing.crop or preprocessing.size}, expected {(side, side)}"
        )
    return preprocessing
