"""Images as prompts: the vectors that stand for them, their files, and how states for cross-attention are made."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsd_fast.jobs import JobError, index_shards, read_manifest, row_id, storable
from dsd_fast.jobs.store import OK, SHARDS
from dsd_fast.jobs.tensors import read_tensors, tensor_bytes, write_tensors
from dsd_fast.kernels.common.transfer import upload
from dsd_fast.models.errors import reason
from dsd_fast.models.prompts import PromptStates, token_limit

if TYPE_CHECKING:
    from dsd_fast.models import Model

KIND = "image-prompts"
"""Of a job whose shards are files of image prompts, shards/<shard>.safetensors."""
SUFFIX = ".safetensors"
_FORMAT = "image-prompts"
_TENSORS = ("vectors", "texts", "ends", "text_of", "pooled")


@dataclass(frozen=True, eq=False, repr=False)
class ImagePrompt:
    """N images as prompts (SD-IPC, Ding et al., arXiv 2305.12716).

    State j of a prompt is its text's where j is before the text's end, and from there on its vector plus ``alpha``
    times the text's. Of an empty text there is the begin state alone. Two are equal whose states are, whatever their
    names. Tensors are held as they are given, and not to be written to afterwards.

    Attributes:
        vectors: (N, E), h of each image.
        texts: (M, t, E), states of the different texts; t are ``tokens`` where ``alpha`` is not 0, else at least as
            many as the largest of ``ends``.
        ends: (M,) int64 on the CPU, from 1: position of the text's end token, the first that the vector takes.
        text_of: (N,) int64 on the CPU, the number of each prompt's text.
        pooled: (N, E2), SDXL's pooled states; None for other families.
        alpha: how much of the text's own states from its end on is added.
        tokens: states of a prompt, 77 with CLIP's tokenizer.
        names: of the images, one each; () for none.
        settings: how they were made, as JSON.
        sources: file and row of each that was loaded; () for none.

    Raises:
        ValueError: a value of another shape or type, or outside its range, by name; numbers that are not finite.
    """

    vectors: Tensor
    texts: Tensor
    ends: Tensor
    text_of: Tensor
    pooled: Tensor | None = None
    alpha: float = 0.0
    tokens: int = 77
    names: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[tuple[Path, int], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not math.isfinite(self.alpha):
            raise ValueError(f"alpha: got {self.alpha!r}, expected a finite number")
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 2:
            raise ValueError(f"tokens: got {self.tokens!r}, expected an integer from 2")
        for name, axes in (("vectors", "NE"), ("texts", "MtE"), ("pooled", "NE")):
            if (value := getattr(self, name)) is not None:
                _check_states(name, value, axes)
        count, width = self.vectors.shape
        if self.texts.shape[2] != width:
            raise ValueError(f"texts: got {self.texts.shape[2]} numbers a state, expected {width} as of vectors")
        _check_numbers("ends", self.ends, len(self.texts), 1, self.tokens - 1)
        _check_numbers("text_of", self.text_of, count, 0, len(self.texts) - 1)
        least = self.tokens if self.alpha else int(self.ends.max()) if len(self.ends) else 0
        if not least <= self.texts.shape[1] <= self.tokens:
            raise ValueError(f"texts: got {self.texts.shape[1]} states each, expected {least} to {self.tokens}")
        if not isinstance(self.names, tuple) or not all(isinstance(name, str) for name in self.names):
            raise ValueError(f"names: got {repr(self.names)[:80]}, expected a tuple of strings")
        for name in ("pooled", "names", "sources"):
            value = getattr(self, name)
            if value is not None and value != () and len(value) != count:
                raise ValueError(f"{name}: got {len(value)}, expected {count} as of vectors")

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> ImagePrompt:
        """Some of them, one for an integer; of texts those that they have."""
        chosen = list(rows) if isinstance(rows, Sequence) else rows
        numbers = torch.arange(len(self), device="cpu")[chosen].flatten()
        used, text_of = torch.unique(self.text_of[numbers], return_inverse=True)
        own, places = upload(numbers, self.vectors.device), numbers.tolist()
        # Not anew through the checks, which one by one would take longer than the rest.
        part = copy(self)
        vars(part).update(
            vectors=self.vectors[own],
            texts=self.texts[upload(used, self.texts.device)],
            ends=self.ends[used],
            text_of=text_of,
            pooled=None if self.pooled is None else self.pooled[own],
            names=tuple(self.names[place] for place in places) if self.names else (),
            sources=tuple(self.sources[place] for place in places) if self.sources else (),
        )
        for known in ("ids", "_text_ids"):
            vars(part).pop(known, None)
        return part

    def __iter__(self) -> Iterator[ImagePrompt]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return self.ids == other.ids if isinstance(other, ImagePrompt) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.ids)

    def __repr__(self) -> str:
        shown = ", ".join([*self.names[:3], *(["…"] if len(self.names) > 3 else [])])
        return f"ImagePrompt({len(self)}{': ' * bool(shown)}{shown})"

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Of each prompt what its states are known by, 32 hexadecimal digits: all that they are made of."""
        about = f"{float(self.alpha)!r} {self.tokens} {self.vectors.dtype}"
        vectors, pooled = (
            [b""] * len(self) if each is None else [tensor_bytes(row).tobytes() for row in each.detach().cpu()]
            for each in (self.vectors, self.pooled)
        )
        texts = self._text_ids
        return tuple(
            row_id(about, texts[number], vector, more)
            for number, vector, more in zip(self.text_of.tolist(), vectors, pooled, strict=True)
        )

    @cached_property
    def _text_ids(self) -> tuple[str, ...]:
        """What each text is known by: its end, and of its states those that count."""
        return tuple(
            row_id(f"{end} {text.dtype}", tensor_bytes(text if self.alpha else text[:end]).tobytes())
            for text, end in zip(self.texts.detach().cpu(), self.ends.tolist(), strict=True)
        )

    @property
    def name(self) -> str:
        """That of the only one; "" where it has none."""
        return self.names[0] if self.names else ""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ImagePrompt:
        """These prompts with their states on a device, and in a floating type."""
        vectors, texts, pooled = (
            None if each is None else upload(each, torch.device(device or each.device), dtype)
            for each in (self.vectors, self.texts, self.pooled)
        )
        assert vectors is not None
        assert texts is not None
        return replace(self, vectors=vectors, texts=texts, pooled=pooled)

    def check(self, model: Model) -> None:
        """Refuse a model whose texts have states of other shapes.

        Raises:
            ValueError: says which.
        """
        pooled = model.text_encoders[-1].config.projection_dim if len(model.text_encoders) == 2 else None
        wanted = (token_limit(model.tokenizers, model.text_encoders), model.text_width, pooled)
        given = (self.tokens, self.vectors.shape[1], None if self.pooled is None else self.pooled.shape[1])
        if given != wanted:
            told = [f"{tokens} states of {width} numbers, pooled {more}" for tokens, width, more in (given, wanted)]
            raise ValueError(f"an image prompt of another model: got {told[0]}, expected {told[1]}")

    def states(self) -> PromptStates:
        """Their states; with ``alpha`` 0 in short, one state for all that are the vector."""
        count, ends = len(self), self.ends[self.text_of]
        width = int(ends.max()) + 1 if count and not self.alpha else self.tokens
        place = torch.arange(width, device="cpu")
        device = self.vectors.device
        texts = self.texts[upload(self.text_of, self.texts.device)]
        # (N, t, E) → (N, T, E)
        if texts.shape[1] < width:
            texts = torch.cat([texts, texts.new_zeros(count, width - texts.shape[1], texts.shape[2])], dim=1)
        texts = texts[:, :width].to(self.vectors)
        before = upload(place < ends[:, None], device)[..., None]
        from_end = self.vectors[:, None] + self.alpha * texts if self.alpha else self.vectors[:, None]
        states = torch.where(before, texts, from_end)
        counts = None
        if not self.alpha:
            counts = (place <= ends[:, None]).to(torch.int64)
            counts = torch.where(place == ends[:, None], self.tokens - ends[:, None], counts)
        lengths = torch.full((count,), width, dtype=torch.int64, device="cpu") if counts is None else ends + 1
        return PromptStates(
            states, self.pooled, lengths, torch.zeros(count, width, dtype=torch.int64, device="cpu"), counts
        )

    @property
    def embeds(self) -> Tensor:
        """All states, (N, ``tokens``, E), as ``prompt_embeds`` of any diffusers pipeline."""
        return self.states().expanded().states

    @staticmethod
    def cat(prompts: Sequence[ImagePrompt]) -> ImagePrompt:
        """The prompts of several in turn, on the first one's device; equal texts are kept once.

        Names and sources are kept where all have some.

        Raises:
            ValueError: none, or some that were made otherwise than the first: another ``alpha`` or ``tokens``, other
                ``settings``, shapes or types.
        """
        if not prompts:
            raise ValueError("prompts: got none, expected at least one")
        first = prompts[0]
        for number, other in enumerate(prompts):
            for name in ("alpha", "tokens", "settings", "_kind"):
                own, wanted = getattr(other, name), getattr(first, name)
                if own != wanted:
                    told = name.removeprefix("_")
                    raise ValueError(f"prompts[{number}]: got {told} {own!r}, expected {wanted!r} as of prompts[0]")
        device = first.vectors.device
        number_of: dict[str, int] = {}
        texts: list[Tensor] = []
        ends: list[int] = []
        text_of: list[int] = []
        for each in prompts:
            for row, text in enumerate(each._text_ids):
                if number_of.setdefault(text, len(ends)) == len(ends):
                    texts.append(upload(each.texts[row], device))
                    ends.append(int(each.ends[row]))
            text_of += [number_of[each._text_ids[row]] for row in each.text_of.tolist()]
        width = first.tokens if first.alpha else max(ends, default=0)
        pooled = [upload(each.pooled, device) for each in prompts if each.pooled is not None]
        blank = first.texts.new_zeros(0, width, first.texts.shape[2])
        return replace(
            first,
            vectors=torch.cat([upload(each.vectors, device) for each in prompts]),
            texts=torch.cat([blank, *(_states_of(text, width)[None] for text in texts)]),
            ends=torch.tensor(ends, dtype=torch.int64, device="cpu"),
            text_of=torch.tensor(text_of, dtype=torch.int64, device="cpu"),
            pooled=torch.cat(pooled) if pooled else None,
            names=_all(prompts, "names"),
            sources=_all(prompts, "sources"),
        )

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file of them holds: its tensors, and what is told about them as JSON."""
        tensors = {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}
        about = {name: getattr(self, name) for name in ("alpha", "tokens", "settings")}
        return tensors, {"format": _FORMAT, **about, "names": [storable(name) for name in self.names]}

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a safetensors file, of numbers as they are: of 10,000 vectors of CLIP-L in float16 15 MB.

        Raises:
            OSError: it cannot be written, or the disk is full.
        """
        write_tensors(Path(file), *self.content())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> ImagePrompt:
        """Read a file of :meth:`save`, or the whole shards of a folder of such in the order of its index, on the CPU.

        Raises:
            ValueError: there is none, or it holds something else.
        """
        path = Path(path)
        if not path.is_dir():
            return _of_file(path)
        try:
            kind = read_manifest(path)["kind"]
        except JobError as error:
            raise ValueError(str(error)) from error
        if kind != KIND:
            raise ValueError(f"{path} holds results of {kind}, expected image prompts")
        parts = []
        for rows in index_shards(path, ["id", "status", "shard", "row"]):
            places = [row["row"] for row in rows.to_pylist() if row["status"] == OK]
            if places:
                parts.append(_of_file(path / SHARDS / f"{rows['shard'][0].as_py()}{SUFFIX}")[places])
        if not parts:
            raise ValueError(f"{path} has no image prompts")
        return ImagePrompt.cat(parts)

    @property
    def _kind(self) -> tuple[object, ...]:
        """Types and widths of their states."""
        given = (self.vectors, self.texts, self.pooled)
        return tuple(None if each is None else (each.dtype, each.shape[-1]) for each in given)


def _of_file(file: Path) -> ImagePrompt:
    if not file.is_file():
        raise ValueError(f"image prompts {str(file)!r} do not exist")
    try:
        tensors, about = read_tensors(file)
        if about.pop("format", None) != _FORMAT:
            raise ValueError("it is another file")
        about["names"] = tuple(about["names"])
        count = len(tensors["vectors"])
        given: dict[str, Any] = {**tensors, **about}
        return ImagePrompt(**given, sources=tuple((file, row) for row in range(count)))
    except Exception as error:
        raise ValueError(f"image prompts {str(file)!r} cannot be read: {reason(error)}") from error


def _states_of(text: Tensor, count: int) -> Tensor:
    """(count, E), the first of a text's states (t, E), and zeros where it has fewer."""
    return pad(text[:count], (0, 0, 0, count - min(count, len(text))))


def _all(prompts: Sequence[ImagePrompt], name: str) -> Any:
    """Names or sources of all, where all have some."""
    values = [getattr(each, name) for each in prompts if len(each)]
    return tuple(value for each in values for value in each) if all(values) else ()


def _check_states(name: str, value: Any, axes: str) -> None:
    if not isinstance(value, Tensor) or value.ndim != len(axes) or not value.is_floating_point():
        shape = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {shape}, expected a tensor ({', '.join(axes)}) of floating-point numbers")
    if not bool(value.detach().isfinite().all()):
        raise ValueError(f"{name}: got numbers that are not finite")


def _check_numbers(name: str, value: Any, count: int, low: int, high: int) -> None:
    if not isinstance(value, Tensor) or value.shape != (count,) or value.dtype != torch.int64 or value.is_cuda:
        shape = (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {shape}, expected a tensor ({count},) of int64 on the CPU")
    if count and not low <= int(value.min()) <= int(value.max()) <= high:
        raise ValueError(f"{name}: got {int(value.min())} to {int(value.max())}, expected {low} to {high}")
