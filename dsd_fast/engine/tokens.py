"""Learned class tokens: their vectors, what is known of them, and their files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsd_fast.jobs.files import replacing
from dsd_fast.jobs.tensors import write_tensors
from dsd_fast.kernels.common.host import as_tensor
from dsd_fast.models.errors import ModelError
from dsd_fast.models.tokens import BANK, POOLED, Vectors, bank_of, of_bank, placed, pool_at_end, read_file

if TYPE_CHECKING:
    import os

LIST = "tokens.json"
# What file systems do not take, or prompts read as something else.
_UNSAFE = re.compile(r"[^\w.-]+")
# Letters of at most four bytes, in names of at most 255.
_LONGEST = 50


class LearnedTokens(Mapping[str, Vectors]):
    """Tokens and their vectors, as :meth:`dsd_fast.models.Model.with_tokens` and ``generate(tokens=)`` take them.

    Args:
        vectors: token → (v, E) or (E,), or {"clip_l": …, "clip_g": …} of SDXL; kept as float32 on the CPU.
        classes: token → the name of its class; a token without one is called by its own.
        about: token → what is known of how it was learned, as JSON.
        settings: how all were learned, as JSON.
        pooled: where the pooled state was taken, see :meth:`dsd_fast.models.Model.with_tokens`.

    Attributes:
        classes, about, settings, pooled: as given.

    Raises:
        ValueError: vectors of another shape or type, or another ``pooled``.
    """

    def __init__(
        self,
        vectors: Mapping[str, Vectors],
        *,
        classes: Mapping[str, str] | None = None,
        about: Mapping[str, Mapping[str, Any]] | None = None,
        settings: Mapping[str, Any] | None = None,
        pooled: str = "stock",
    ) -> None:
        if pooled not in POOLED:
            raise ValueError(f"pooled: got {pooled!r}, expected one of {', '.join(POOLED)}")
        self._vectors: dict[str, Vectors] = {token: _kept(token, value) for token, value in vectors.items()}
        self.classes = {token: (classes or {}).get(token, token) for token in self._vectors}
        self.about = {token: dict((about or {}).get(token, {})) for token in self._vectors}
        self.settings, self.pooled = dict(settings or {}), pooled

    def __getitem__(self, token: str) -> Vectors:
        return self._vectors[token]

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def __repr__(self) -> str:
        shown = ", ".join([*list(self)[:3], *(["…"] if len(self) > 3 else [])])
        return f"LearnedTokens({len(self)}: {shown})"

    def subset(self, names: Iterable[str]) -> LearnedTokens:
        """Give some of them, by token or by class, in that order.

        Raises:
            KeyError: a name that none has.
        """
        by_class = {name: token for token, name in self.classes.items()}
        tokens = [name if name in self else by_class[name] for name in names]
        return LearnedTokens(
            {token: self[token] for token in tokens},
            classes=self.classes,
            about=self.about,
            settings=self.settings,
            pooled=self.pooled,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder, in place of the tokens that it has.

        First ``bank.safetensors``, all of it, by which the folder is read: one that could not be finished is of the
        older tokens or of these. Then the files of :meth:`write_files`, and ``tokens.json`` for people.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        folder = Path(folder)
        files = self.files()
        # While the older bank still tells of them: no other would know them for tokens that are no longer.
        for file in _listed(folder / BANK) - set(files.values()):
            (folder / file).unlink(missing_ok=True)
        about = {
            "tokens": list(self),
            "files": files,
            "classes": self.classes,
            "about": self.about,
            "settings": self.settings,
            "pooled": self.pooled,
        }
        # The tensor without a name keeps A1111 from taking the bank of one token for a token called "bank".
        nameless = {"": torch.zeros(0, dtype=torch.float32, device="cpu")}
        write_tensors(folder / BANK, {**bank_of(self), **nameless}, about)
        self.write_files(folder)
        shown = {token: {"class": self.classes[token], "file": files[token], **self.about[token]} for token in self}
        with replacing(folder / LIST) as stream:
            content = {"tokens": shown, "pooled": self.pooled, "settings": self.settings}
            stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def write_files(self, folder: str | os.PathLike[str]) -> dict[str, str]:
        """Write a file for each token, as diffusers and the embeddings folders of A1111 and ComfyUI read them.

        Returns:
            token → the file's name, see :meth:`files`.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        folder, files = Path(folder), self.files()
        folder.mkdir(parents=True, exist_ok=True)
        for token, vectors in self.items():
            # SDXL's have no key for the token's name, which is told besides.
            tensors = vectors if isinstance(vectors, Mapping) else {token: vectors}
            write_tensors(folder / files[token], tensors, {"token": token})
        return files

    def files(self) -> dict[str, str]:
        """Tell the name of each token's file: ``<cardinal>`` is in ``cardinal-token.safetensors``.

        In A1111 a file's stem is the word that prompts name it by, and a plain word would be taken for the token
        wherever it stands.
        """
        taken, files = {BANK.lower()}, {}
        for token in self:
            bare = token.strip("<>")
            stem = _UNSAFE.sub("_", bare).strip("._-")[:_LONGEST] or "token"
            stem += "-token" if bare != token else ""
            file, number = f"{stem}.safetensors", 1
            # Some file systems take no note of case.
            while file.lower() in taken:
                number += 1
                file = f"{stem}-{number}.safetensors"
            taken.add(file.lower())
            files[token] = file
        return files

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LearnedTokens:
        """Read what :meth:`save` wrote: a folder, or its ``bank.safetensors``.

        Raises:
            ModelError: no such file, or another one.
        """
        path = Path(folder)
        path = path / BANK if path.is_dir() else path
        tensors, about = read_file(path)
        if "tokens" not in about:
            raise ModelError(f"tokens file {str(path)!r} is no bank of tokens")
        vectors = of_bank(tensors, about, f"tokens file {str(path)!r}")
        return cls(
            vectors, **{name: about.get(name) for name in ("classes", "about", "settings")}, pooled=about["pooled"]
        )

    def load_into(self, pipe: Any) -> None:
        """Load all into a stock diffusers pipeline, whose prompts may then name them.

        By its own ``load_textual_inversion``, which is called once for each text encoder. Where the tokens were learned
        with ``pooled="end"``, the encoders take their pooled state there from now on.

        Raises:
            ModelError: vectors that fit none of the pipeline's text encoders.
            ValueError: by diffusers, a token that the pipeline's tokenizer knows.
        """
        encoders = [each for each in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if each is not None]
        widths = [encoder.config.hidden_size for encoder in encoders]
        given: list[list[dict[str, Tensor]]] = [[] for _ in encoders]
        for token, vectors in self.items():
            for number, value in placed(vectors, widths, f"token {token!r}"):
                given[number].append({token: value})
        for encoder, tokens, name in zip(encoders, given, ("tokenizer", "tokenizer_2"), strict=False):
            tokenizer = getattr(pipe, name)
            if tokens:
                pipe.load_textual_inversion(tokens, text_encoder=encoder, tokenizer=tokenizer)
                if self.pooled == "end":
                    pool_at_end(encoder, tokenizer)


def _kept(token: str, value: Vectors) -> Vectors:
    if isinstance(value, Mapping):
        return {name: _rows(f"token {token!r}, {name}", own) for name, own in value.items()}
    return _rows(f"token {token!r}", value)


def _rows(what: str, value: Tensor) -> Tensor:
    value = as_tensor(value)
    value = value[None] if value.ndim == 1 else value
    if value.ndim != 2 or not len(value) or not value.is_floating_point():
        raise ValueError(f"{what}: got vectors of {tuple(value.shape)} {value.dtype}, expected floats (vectors, width)")
    return value.detach().to("cpu", torch.float32, copy=True).contiguous()


def _listed(bank: Path) -> set[str]:
    """The token files that a folder's bank names, of this folder alone."""
    try:
        names = {str(each) for each in read_file(bank)[1]["files"].values()}
    except (ModelError, KeyError, AttributeError):
        return set()
    return {name for name in names if Path(name).name == name and name.endswith(".safetensors")}
