"""Fine-grained prompts from an image-captioning model of transformers.

A detailed prompt keeps features true to the image (Meng et al., arXiv 2410.06719, section 5.1): what the caption names
the network need not imagine.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch

from dsd_fast.images import ImageSource, load_image
from dsd_fast.kernels.common.host import ordinary, own_types
from dsd_fast.models import Model
from dsd_fast.models.hub import find_folder
from dsd_fast.models.load import (
    TRANSFORMERS_STEM,
    check_weights,
    load_network,
    reported,
    resolve_device,
    resolve_dtype,
    weight_patterns,
)
from dsd_fast.models.prompts import as_tokens, check_unicode, token_limit

QUALITY = "high quality, best quality, highly realistic, masterpiece"
"""The words that the official code adds to every prompt."""

_TOKENIZER_FILES = ["*.json", "vocab.txt", "merges.txt", "*.model"]


def caption(
    images: Iterable[ImageSource],
    captioner: str | os.PathLike[str] | tuple[Any, Any],
    *,
    prefix: str = "",
    quality: str = QUALITY,
    model: Model | None = None,
    max_new_tokens: int = 60,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    local_files_only: bool = False,
) -> list[str]:
    """A prompt for each image: what the captioner says, a comma, and the quality words.

    Decoding is greedy, so that equal images get equal prompts.

    Args:
        images: what `load_image` takes.
        captioner: a folder or hub id, or what `load_captioner` gives: BLIP, GIT, an encoder-decoder of a vision and a
            text model such as ViT-GPT2, Kosmos-2, or another image-to-text model that goes on with a given text.
        prefix: words that the caption begins with, "a photo of" for instance; they stay in it. Kosmos-2 needs some.
        quality: words after the caption, "" for none.
        model: cut the caption, by whole words, so that the prompt fits the text encoders of this model; None: as long
            as it comes.
        max_new_tokens: the longest caption in the captioner's tokens.
        batch_size: images at once.
        device, local_files_only: for a captioner given by name.

    Raises:
        ModelError: a captioner that cannot be loaded, as in `load_captioner`.
        ImageError: of the first image that cannot be used.
        ValueError: counts below 1, words that are no text, or quality words that alone are too long for the text
            encoders.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    for name, text in (("prefix", prefix), ("quality", quality)):
        check_unicode(name, text)
    tail = f", {quality}" if quality else ""
    if model is not None and _num_tokens(model, quality) > _limit(model):
        raise ValueError(
            f"quality has {_num_tokens(model, quality)} tokens, expected at most {_limit(model)}, start and end tokens "
            "included"
        )
    if not isinstance(captioner, tuple):
        captioner = load_captioner(captioner, device=device, local_files_only=local_files_only)
    network, processor = captioner
    prompts: list[str] = []
    pictures = map(load_image, images)
    while some := list(islice(pictures, batch_size)):
        inputs = _inputs(network, processor, some, prefix)
        with torch.inference_mode(), own_types(network.device):
            tokens = network.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        for text in processor.batch_decode(tokens, skip_special_tokens=True):
            if network.config.model_type == "kosmos-2":
                # Its captions mark where things are.
                text = processor.post_process_generation(text)[0]
            words = text.split()
            prompts.append(" ".join(words if model is None else _fitting(model, words, tail)) + tail)
    return [prompt.removeprefix(", ") for prompt in prompts]


@ordinary()
def load_captioner(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any]:
    """An image-to-text model of transformers, in eval mode, and its processor.

    Only safetensors, JSON and tokenizer files are read or downloaded, and no code that lies beside them is run.

    Args:
        source: a folder as transformers' `save_pretrained` writes it, or a hub id.
        device, dtype, revision, local_files_only, cache_dir: as in `dsd_fast.load`.

    Raises:
        ModelError: naming what was given and what was expected, as `dsd_fast.load` does; or a model of another kind.
    """
    from transformers import AutoModelForImageTextToText

    torch_dtype, torch_device = resolve_dtype(dtype), resolve_device(device)
    folder, _ = find_folder(
        source,
        [*_TOKENIZER_FILES, *weight_patterns(TRANSFORMERS_STEM, None)],
        what="captioner",
        revision=revision,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    what = f"captioner {os.fspath(source)!r}"
    check_weights(folder, TRANSFORMERS_STEM, None, what)
    network = load_network(AutoModelForImageTextToText, folder, torch_dtype, None, what)
    with reported(what):
        processor = _processor(folder)
    return network.requires_grad_(False).to(torch_device), processor


class _Pair:
    """An image processor and a tokenizer where a model has no class for both."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.batch_decode = tokenizer.batch_decode


def _processor(folder: os.PathLike[str]) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    found = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(found, "image_processor") and hasattr(found, "tokenizer"):
        return found
    options = {"local_files_only": True, "trust_remote_code": False}
    return _Pair(
        AutoImageProcessor.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder, **options)
    )


def _inputs(network: Any, processor: Any, images: list[Any], prefix: str) -> dict[str, Any]:
    """The arguments of `generate`: pixels, and the prefix as each kind of model takes it."""
    kind, count = network.config.model_type, len(images)
    if prefix and kind not in ("git", "vision-encoder-decoder"):
        inputs = dict(processor(images=images, text=[prefix] * count, return_tensors="pt"))
    else:
        inputs = {"pixel_values": processor.image_processor(images=images, return_tensors="pt")["pixel_values"]}
    if prefix and kind == "git":
        # Without the token that would end the text.
        ids = processor.tokenizer(prefix, add_special_tokens=False).input_ids
        inputs["input_ids"] = torch.tensor([[processor.tokenizer.cls_token_id, *ids]] * count, device="cpu")
    elif prefix and kind == "vision-encoder-decoder":
        ids = processor.tokenizer(prefix, add_special_tokens=False).input_ids
        inputs["decoder_input_ids"] = torch.tensor(
            [[network.generation_config.decoder_start_token_id, *ids]] * count, device="cpu"
        )
    return {
        key: value.to(network.device, network.dtype) if torch.is_floating_point(value) else value.to(network.device)
        for key, value in inputs.items()
    }


def _fitting(model: Model, words: list[str], tail: str) -> list[str]:
    """As many words from the start as the text encoders take together with the tail."""
    counts = range(1, len(words) + 1)
    fits = bisect_right(counts, _limit(model), key=lambda count: _num_tokens(model, " ".join(words[:count]) + tail))
    return words[:fits]


def _num_tokens(model: Model, text: str) -> int:
    """Start and end tokens included."""
    return max(len(as_tokens(tokenizer, text).input_ids) for tokenizer in model.tokenizers)


def _limit(model: Model) -> int:
    return token_limit(model.tokenizers, model.text_encoders)
