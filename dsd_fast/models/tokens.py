"""Learned tokens: vectors beside a text encoder's own, by textual inversion.

Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion". A token
of several vectors is that many tokens, ``<cat>``, ``<cat>_1``, …, which a prompt's ``<cat>`` is spelled out to, as in
diffusers' ``load_textual_inversion``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsd_fast.kernels.common.host import as_tensor
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.errors import ModelError, reason
from dsd_fast.models.private import private
from dsd_fast.models.prompts import as_tokens

Vectors = Tensor | Mapping[str, Tensor]
TokenSource = str | os.PathLike[str] | Mapping[str, Vectors] | Sequence[str | os.PathLike[str]]

# SDXL's encoders, as files for both name them.
_ENCODERS = ("clip_l", "clip_g")
# Keys of A1111's files, which are no tokens: there the file's name is.
_UNNAMED = {"emb_params", "*"}


def with_tokens(
    tokenizers: Sequence[Any], text_encoders: Sequence[Any], source: TokenSource
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Copies tokenizers and text encoders that know the tokens of ``source``; see `Model.with_tokens`."""
    widths = [encoder.config.hidden_size for encoder in text_encoders]
    learned: list[dict[str, Tensor]] = [{} for _ in widths]
    for token, vectors, what in _read(source):
        for number, value in _placed(vectors, widths, what):
            if token in learned[number]:
                raise ModelError(f"{what} has vectors for token {token!r}, which another one gave before")
            learned[number][token] = value
    if not any(learned):
        raise ModelError(f"tokens: {source!r} has none")
    pairs = [
        _extended(tokenizer, encoder, tokens) if tokens else (tokenizer, encoder)
        for tokenizer, encoder, tokens in zip(tokenizers, text_encoders, learned, strict=True)
    ]
    return tuple(tokenizer for tokenizer, _ in pairs), tuple(encoder for _, encoder in pairs)


def _read(source: TokenSource) -> Iterator[tuple[str, Vectors, str]]:
    """Each token with its vectors, and what errors call it."""
    if isinstance(source, Mapping):
        yield from ((token, vectors, f"token {token!r}") for token, vectors in source.items())
        return
    if not isinstance(source, str | os.PathLike):
        for each in source:
            yield from _read(each)
        return
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ModelError(f"tokens: folder {str(source)!r} has no .safetensors file")
    for file in files:
        yield _read_file(file)


def _read_file(file: Path) -> tuple[str, Vectors, str]:
    from safetensors.torch import load_file

    what = f"tokens file {str(file)!r}"
    if not file.is_file():
        raise ModelError(f"{what} does not exist")
    if file.suffix != ".safetensors":
        raise ModelError(f"{what} may be a pickle, which can run code when loaded; expected .safetensors")
    try:
        tensors = load_file(file)
    except Exception as error:
        raise ModelError(f"{what} cannot be read: {reason(error)}") from error
    if tensors.keys() <= set(_ENCODERS) and tensors:
        return file.stem, tensors, what
    if len(tensors) != 1:
        keys = ", ".join(sorted(tensors)[:3]) or "none"
        raise ModelError(f"{what} has {len(tensors)} tensors ({keys}), expected one token's, or clip_l and clip_g")
    ((key, value),) = tensors.items()
    return (file.stem if key in _UNNAMED else key), value, what


def _placed(vectors: Vectors, widths: Sequence[int], what: str) -> Iterator[tuple[int, Tensor]]:
    """The vectors (v, E) for each text encoder that they are for, by its number."""
    if isinstance(vectors, Mapping):
        if not vectors or not vectors.keys() <= set(_ENCODERS[: len(widths)]):
            given, known = ", ".join(vectors) or "nothing", " and ".join(_ENCODERS[: len(widths)])
            raise ModelError(f"{what} has vectors for {given}, expected for {known}")
        placed = {_ENCODERS.index(name): as_tensor(value) for name, value in vectors.items()}
    else:
        value = as_tensor(vectors)
        fitting = [number for number, width in enumerate(widths) if value.ndim and value.shape[-1] == width]
        if len(fitting) > 1:
            raise ModelError(f"{what}: both text encoders are {widths[0]} wide; say which by clip_l and clip_g")
        placed = {fitting[0] if fitting else 0: value}
    for number, value in placed.items():
        value = value[None] if value.ndim == 1 else value
        if value.ndim != 2 or not len(value) or value.shape[1] != widths[number] or not value.is_floating_point():
            expected = " or ".join(map(str, widths)) if len(placed) == 1 else str(widths[number])
            raise ModelError(
                f"{what} has vectors of {tuple(value.shape)} {value.dtype}, expected floats (vectors, {expected})"
            )
        if not value.isfinite().all():
            raise ModelError(f"{what} has vectors with infinite numbers, or that are none")
        yield number, value


def _extended(tokenizer: Any, encoder: Any, tokens: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Copies of both with the tokens' names and vectors behind their own, on the same weights but for those."""
    tokenizer, first = copy.deepcopy(tokenizer), len(tokenizer)
    names = [name for token, value in tokens.items() for name in _spelled(token, len(value))]
    _check_names(tokenizer, tokens, names)
    tokenizer.add_tokens(names)
    for number, name in enumerate(names, first):
        read = as_tokens(tokenizer, name, add_special_tokens=False)["input_ids"]
        if read != [number]:
            raise ModelError(f"token {name!r} is not read as a word of its own by this model's tokenizer")
    encoder = private(encoder)
    embedding = encoder.get_input_embeddings()
    old = embedding.weight
    if type(embedding) is not nn.Embedding or len(old) < first:
        raise ModelError(
            f"tokens: the text encoder's embedding is {type(embedding).__name__} of {len(old)} tokens, expected "
            f"torch's Embedding of at least {first}, the tokenizer's"
        )
    with torch.no_grad():
        learned = upload(torch.cat([value.detach().cpu() for value in tokens.values()]), old.device, old.dtype)
        embedding.weight = nn.Parameter(torch.cat([old[:first], learned]), requires_grad=False)
    embedding.num_embeddings = encoder.config.vocab_size = first + len(names)
    for module in encoder.modules():
        # Where a config has this number, transformers takes the pooled state from the largest token id of a prompt,
        # which was the end's before there were others behind it.
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tokenizer.eos_token_id
    return tokenizer, encoder


def _spelled(token: str, vectors: int) -> list[str]:
    return [token, *(f"{token}_{number}" for number in range(1, vectors))]


def _check_names(tokenizer: Any, tokens: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Refuse tokens that a prompt could not name, or that spelling out would mix up."""
    known = tokenizer.get_vocab()
    for name in names:
        if not name or name.split() != [name]:
            raise ModelError(f"token is {name!r}, expected a name without spaces")
        if name in known or names.count(name) > 1:
            raise ModelError(f"token {name!r} is in the tokenizer's vocabulary, or given twice; expected another name")
    every = {*names, *tokenizer.get_added_vocab()}
    for token, value in tokens.items():
        own = _spelled(token, len(value) + 1)
        mixed = own[-1:] if own[-1] in every else []
        if len(value) > 1:
            mixed += [name for name in every if token in name and name not in own]
        if mixed:
            raise ModelError(f"token {token!r} would be taken for a part of token {mixed[0]!r}; expected another name")
