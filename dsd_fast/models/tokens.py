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

from dsd_fast.jobs.tensors import read_tensors
from dsd_fast.kernels.common.host import as_tensor
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.errors import ModelError, reason
from dsd_fast.models.private import private
from dsd_fast.models.prompts import as_tokens

Vectors = Tensor | Mapping[str, Tensor]
TokenSource = str | os.PathLike[str] | Mapping[str, Vectors] | Sequence[str | os.PathLike[str]]

# SDXL's encoders, as files for both name them.
ENCODERS = ("clip_l", "clip_g")
POOLED = ("stock", "end")
# One file of all tokens of a folder.
BANK = "bank.safetensors"
# Keys of A1111's files, which are no tokens: there the file's name is.
_UNNAMED = {"emb_params", "*"}


def with_tokens(
    tokenizers: Sequence[Any], text_encoders: Sequence[Any], source: TokenSource, pooled: str | None = None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Copies tokenizers and text encoders that know the tokens of ``source``; see `Model.with_tokens`."""
    pooled = _pooled_of(source) if pooled is None else pooled
    widths = [encoder.config.hidden_size for encoder in text_encoders]
    learned: list[dict[str, Tensor]] = [{} for _ in widths]
    for token, vectors, what in _read(source):
        for number, value in placed(vectors, widths, what):
            if token in learned[number]:
                raise ModelError(f"{what} has vectors for token {token!r}, which another one gave before")
            learned[number][token] = value
    if not any(learned):
        raise ModelError(f"tokens: {source!r} has none")
    pairs = [
        _extended(tokenizer, encoder, tokens, pooled) if tokens else (tokenizer, encoder)
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
    files = _files(Path(source))
    if not files:
        raise ModelError(f"tokens: folder {str(source)!r} has no .safetensors file")
    for file in files:
        yield from _read_file(file)


def _files(path: Path) -> list[Path]:
    """A folder's files, its bank first and without those whose tokens the bank has."""
    if not path.is_dir():
        return [path]
    files, bank = sorted(path.glob("*.safetensors")), path / BANK
    if bank not in files:
        return files
    told = read_file(bank)[1].get("files", {}).values()
    return [bank, *(file for file in files if file != bank and file.name not in told)]


def read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of tokens, and what was written about them.

    Raises:
        ModelError: no such file, a pickle, or no safetensors.
    """
    what = f"tokens file {str(file)!r}"
    if not file.is_file():
        raise ModelError(f"{what} does not exist")
    if file.suffix != ".safetensors":
        raise ModelError(f"{what} may be a pickle, which can run code when loaded; expected .safetensors")
    try:
        tensors, about = read_tensors(file)
    except Exception as error:
        raise ModelError(f"{what} cannot be read: {reason(error)}") from error
    return tensors, about if isinstance(about, dict) else {}


def _read_file(file: Path) -> Iterator[tuple[str, Vectors, str]]:
    tensors, about = read_file(file)
    what = f"tokens file {str(file)!r}"
    if "tokens" in about:
        yield from ((token, vectors, what) for token, vectors in of_bank(tensors, about, what).items())
        return
    if tensors.keys() <= set(ENCODERS) and tensors:
        yield about.get("token", file.stem), tensors, what
        return
    if len(tensors) != 1:
        keys = ", ".join(sorted(tensors)[:3]) or "none"
        raise ModelError(f"{what} has {len(tensors)} tensors ({keys}), expected one token's, or clip_l and clip_g")
    ((key, value),) = tensors.items()
    yield (file.stem if key in _UNNAMED else key), value, what


def bank_of(tokens: Mapping[str, Vectors]) -> dict[str, Tensor]:
    """The tensors of a bank: a token's under its name, or under "clip_l:" and "clip_g:" and its name."""
    return {
        name: value
        for token, vectors in tokens.items()
        for name, value in (
            ((f"{encoder}:{token}", own) for encoder, own in vectors.items())
            if isinstance(vectors, Mapping)
            else ((token, vectors),)
        )
    }


def of_bank(tensors: Mapping[str, Tensor], about: Mapping[str, Any], what: str) -> dict[str, Vectors]:
    """The inverse of :func:`bank_of`; the tokens of ``about["tokens"]`` in their order.

    Raises:
        ModelError: a token without its vectors, by ``what``.
    """
    tokens: dict[str, Vectors] = {}
    for token in about["tokens"]:
        parts = {encoder: tensors[f"{encoder}:{token}"] for encoder in ENCODERS if f"{encoder}:{token}" in tensors}
        if not parts and token not in tensors:
            raise ModelError(f"{what} has no vectors for its token {token!r}")
        tokens[token] = parts or tensors[token]
    return tokens


def _pooled_of(source: TokenSource) -> str:
    """Where those who learned the tokens took the pooled state."""
    if isinstance(source, str | os.PathLike):
        files = _files(Path(source))
        told = read_file(files[0])[1].get("pooled") if files else None
        return told if told in POOLED else POOLED[0]
    if isinstance(source, Mapping):
        return getattr(source, "pooled", POOLED[0])
    every = {_pooled_of(each) for each in source}
    if len(every) > 1:
        raise ModelError("tokens: some were learned with the pooled state at the end token and some not; say pooled")
    return every.pop() if every else POOLED[0]


def placed(vectors: Vectors, widths: Sequence[int], what: str) -> Iterator[tuple[int, Tensor]]:
    """The vectors (v, E) for each text encoder that they are for, by its number.

    Raises:
        ModelError: vectors that fit none of the encoders' widths, or are no finite numbers, by ``what``.
    """
    if isinstance(vectors, Mapping):
        if not vectors or not vectors.keys() <= set(ENCODERS[: len(widths)]):
            given, known = ", ".join(vectors) or "nothing", " and ".join(ENCODERS[: len(widths)])
            raise ModelError(f"{what} has vectors for {given}, expected for {known}")
        own = {ENCODERS.index(name): as_tensor(value) for name, value in vectors.items()}
    else:
        value = as_tensor(vectors)
        fitting = [number for number, width in enumerate(widths) if value.ndim and value.shape[-1] == width]
        if len(fitting) > 1:
            raise ModelError(f"{what}: both text encoders are {widths[0]} wide; say which by clip_l and clip_g")
        own = {fitting[0] if fitting else 0: value}
    for number, value in own.items():
        value = value[None] if value.ndim == 1 else value
        if value.ndim != 2 or not len(value) or value.shape[1] != widths[number] or not value.is_floating_point():
            expected = " or ".join(map(str, widths)) if len(own) == 1 else str(widths[number])
            raise ModelError(
                f"{what} has vectors of {tuple(value.shape)} {value.dtype}, expected floats (vectors, {expected})"
            )
        if not value.isfinite().all():
            raise ModelError(f"{what} has vectors with infinite numbers, or that are none")
        yield number, value


def _extended(tokenizer: Any, encoder: Any, tokens: Mapping[str, Tensor], pooled: str) -> tuple[Any, Any]:
    """Copies of both with the tokens' names and vectors behind their own, on the same weights but for those."""
    first = len(tokenizer)
    tokenizer = knowing(tokenizer, {token: len(value) for token, value in tokens.items()})
    encoder = private(encoder)
    embedding = vocabulary(encoder, first)
    old = embedding.weight
    with torch.no_grad():
        learned = upload(torch.cat([value.detach().cpu() for value in tokens.values()]), old.device, old.dtype)
        embedding.weight = nn.Parameter(torch.cat([old[:first], learned]), requires_grad=False)
    embedding.num_embeddings = encoder.config.vocab_size = len(tokenizer)
    if pooled == "end":
        pool_at_end(encoder, tokenizer)
    return tokenizer, encoder


def knowing(tokenizer: Any, tokens: Mapping[str, int]) -> Any:
    """A copy of a tokenizer that knows tokens of so many vectors each, behind its own.

    Raises:
        ModelError: a name that it knows already, that is no word of its own, or could be mixed up with another.
    """
    tokenizer, first = copy.deepcopy(tokenizer), len(tokenizer)
    names = [name for token, count in tokens.items() for name in _spelled(token, count)]
    _check_names(tokenizer, tokens, names)
    tokenizer.add_tokens(names)
    for number, name in enumerate(names, first):
        read = as_tokens(tokenizer, name, add_special_tokens=False)["input_ids"]
        if read != [number]:
            raise ModelError(f"token {name!r} is not read as a word of its own by this model's tokenizer")
    return tokenizer


def vocabulary(encoder: Any, tokens: int) -> nn.Embedding:
    """The table of an encoder's vectors, of at least so many tokens.

    Raises:
        ModelError: it has another kind of table, or a smaller one.
    """
    embedding = encoder.get_input_embeddings()
    if type(embedding) is not nn.Embedding or len(embedding.weight) < tokens:
        raise ModelError(
            f"tokens: the text encoder's embedding is {type(embedding).__name__} of {len(embedding.weight)} tokens, "
            f"expected torch's Embedding of at least {tokens}, the tokenizer's"
        )
    return embedding


def pool_at_end(encoder: Any, tokenizer: Any) -> None:
    """Let an encoder take its pooled state at the end token.

    Where its config has the number 2 for that token, transformers takes it from the largest token id of a prompt, which
    was the end's before there were others behind it.
    """
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tokenizer.eos_token_id


def _spelled(token: str, vectors: int) -> list[str]:
    return [token, *(f"{token}_{number}" for number in range(1, vectors))]


def _check_names(tokenizer: Any, tokens: Mapping[str, int], names: Sequence[str]) -> None:
    """Refuse tokens that a prompt could not name, or that spelling out would mix up."""
    known = tokenizer.get_vocab()
    for name in names:
        if not name or name.split() != [name]:
            raise ModelError(f"token is {name!r}, expected a name without spaces")
        if name in known or names.count(name) > 1:
            raise ModelError(f"token {name!r} is in the tokenizer's vocabulary, or given twice; expected another name")
    every = {*names, *tokenizer.get_added_vocab()}
    for token, count in tokens.items():
        own = _spelled(token, count + 1)
        mixed = own[-1:] if own[-1] in every else []
        if count > 1:
            mixed += [name for name in every if token in name and name not in own]
        if mixed:
            raise ModelError(f"token {token!r} would be taken for a part of token {mixed[0]!r}; expected another name")
