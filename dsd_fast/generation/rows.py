"""A row: one image to be made."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dsd_fast.engine import ImagePrompt
from dsd_fast.engine.encoding import Prompt
from dsd_fast.engine.items import read_source
from dsd_fast.images import ImageSource, take
from dsd_fast.jobs import row_id, storable


@dataclass(frozen=True)
class GenerateRow:
    """One image to be made; what is None is as the configuration says.

    Attributes:
        prompt: the text, or an image as a prompt.
        seed: of its noise, 0 ≤ seed < 2**64.
        negative_prompt: in the place of the absent prompt.
        size: (height, width) in pixels.
        steps, guidance, guidance_rescale, clip_skip, strength, adapter: see :class:`GenerateConfig`.
        image: that is started from.
        conditions: an image for each ControlNet; () makes it without any.
        original_size, crop, target_size: SDXL's micro-conditioning, (height, width), (top, left) and (height, width) in
            pixels; None: ``size``, (0, 0) and ``size``.
        label: the name of its class.
        cls: the index of its class.
        name: for people.

    Raises:
        ValueError: a value of another type or outside its range, by name.
    """

    prompt: Prompt
    seed: int = 0
    negative_prompt: Prompt | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float | None = None
    clip_skip: int | None = None
    image: ImageSource | None = None
    strength: float | None = None
    conditions: tuple[ImageSource, ...] = ()
    adapter: tuple[str, ...] | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    label: str | None = None
    cls: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for name, (convert, expected) in _CHECKS.items():
            value = getattr(self, name)
            if value is None and name not in _NEEDED:
                continue
            try:
                # A plain Python value, of which text is made.
                object.__setattr__(self, name, convert(value))
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"{name}: got {repr(value)[:80]}, expected {expected}") from None

    @property
    def sources(self) -> tuple[ImageSource, ...]:
        """All images that it is made of: the one that is started from, then the conditions."""
        return (*(() if self.image is None else (self.image,)), *self.conditions)


def check_seed(value: Any) -> int:
    """A seed as a Python integer.

    Raises:
        TypeError, ValueError: it is no integer, or not from 0 to 2**64 - 1.
    """
    return _whole(value, 0, (1 << 64) - 1)


def _whole(value: Any, low: int, high: int) -> int:
    number = operator.index(value)
    if isinstance(value, bool) or not low <= number <= high:
        raise ValueError
    return number


def _int32(value: Any, low: int) -> int:
    """What a column of the index holds."""
    return _whole(value, low, (1 << 31) - 1)


def _real(value: Any, holds: Callable[[float], bool] = math.isfinite) -> float:
    if isinstance(value, bool | str) or not holds(number := float(value)):
        raise ValueError
    return number


def _pair(value: Any, low: int) -> tuple[int, int]:
    first, second = value
    return _int32(first, low), _int32(second, low)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return str(value)


def _prompt(value: Any) -> Prompt:
    if isinstance(value, ImagePrompt) and len(value) != 1:
        raise ValueError
    return value if isinstance(value, ImagePrompt) else _text(value)


def _image(value: Any) -> Any:
    if value is None or isinstance(value, str | bytes):
        raise TypeError
    return value


def _images(value: Any) -> tuple[Any, ...]:
    return tuple(map(_image, value if isinstance(value, list | tuple) else (value,)))


def _names(value: Any) -> tuple[str, ...]:
    return tuple(map(_text, (value,) if isinstance(value, str) else value))


_SIZE = partial(_pair, low=1), "(height, width), two positive integers below 2**31"
_SOURCE = "a pathlib.Path, a Pillow image, an array or a tensor; strings are text"
_PROMPT = "a text, or one image as a prompt"
_CHECKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "prompt": (_prompt, _PROMPT),
    "seed": (check_seed, "an integer from 0 to 2**64 - 1"),
    "negative_prompt": (_prompt, _PROMPT),
    "size": _SIZE,
    "steps": (partial(_int32, low=1), "a positive integer below 2**31"),
    "guidance": (_real, "a finite number"),
    "guidance_rescale": (partial(_real, holds=lambda value: 0 <= value <= 1), "a number from 0 to 1"),
    "clip_skip": (partial(_int32, low=0), "an integer from 0, below 2**31"),
    "image": (_image, _SOURCE),
    "strength": (partial(_real, holds=lambda value: 0 < value <= 1), "a number above 0, at most 1"),
    "conditions": (_images, f"images, each {_SOURCE}"),
    "adapter": (_names, "names of adapters"),
    "original_size": _SIZE,
    "crop": (partial(_pair, low=0), "(top, left), two integers from 0, below 2**31"),
    "target_size": _SIZE,
    "label": (_text, "a text"),
    "cls": (partial(_int32, low=0), "an integer from 0, below 2**31"),
    "name": (_text, "a text"),
}
_NEEDED = {"prompt", "seed", "conditions", "name"}
_SOURCES = ("image", "conditions")
_PAIRS = ("original_size", "crop", "target_size")
_PROMPTS = {"prompt": "image_prompt", "negative_prompt": "negative_image_prompt"}

COLUMNS = {
    "prompt": "string",
    "seed": "uint64",
    "negative_prompt": "string",
    "image_prompt": "string",
    "negative_image_prompt": "string",
    "height": "int32",
    "width": "int32",
    "steps": "int32",
    "guidance": "float64",
    "guidance_rescale": "float64",
    "clip_skip": "int32",
    "image": "string",
    "strength": "float64",
    "conditions": "string",
    "adapter": "string",
    "original_size": "string",
    "crop": "string",
    "target_size": "string",
    "label": "string",
    "cls": "int32",
}
"""Of the index: a row's fields, null where they are None; lists and pairs as JSON; of an image the path of its file, ""
where it was given as an object. A path that was given as a relative one is as seen from the folder of the index. Where
an image is the prompt, that is its name, and image_prompt the path of its file and its row there."""


def row_id_of(row: GenerateRow, digests: Sequence[str] = ()) -> str:
    """What a row is known by: all that it says, images and images as prompts by their content and not by their paths.

    Rows that are equal in all of it, the name included, are one. What a row leaves to the configuration is no part of
    it: that is the job's.

    Args:
        digests: one for each of ``row.sources``, see :func:`identified`.

    Raises:
        ValueError: another number of digests.
    """
    if len(digests) != len(row.sources):
        raise ValueError(f"digests: got {len(digests)}, expected one for each of {len(row.sources)} images")
    said = {name: value for name, value in vars(row).items() if value is not None and name not in _SOURCES}
    content = json.dumps(said, sort_keys=True, default=lambda prompt: {"image_prompt": prompt.ids})
    return row_id(content, "" if row.image is None else "image", *digests)


def identified(row: GenerateRow) -> tuple[str, GenerateRow]:
    """A row's id, and the row with its images out of their owners' reach; image files are read.

    Of a file that cannot be read the path counts, and loading it says why.
    """
    if not row.sources:
        return row_id_of(row), row
    read = [read_source(source) for source in row.sources]
    found = tuple(source for source, _ in read)
    start = row.image is not None
    taken = replace(row, image=found[0] if start else None, conditions=found[start:])
    return row_id_of(row, [digest for _, (digest, _, _) in read]), taken


def taken(row: GenerateRow) -> GenerateRow:
    """The row with its images out of their owners' reach, who may fill them again for the next one."""
    if not row.sources:
        return row
    return replace(row, image=take(row.image), conditions=tuple(map(take, row.conditions)))


def columns(row: GenerateRow, folder: str | os.PathLike[str] = ".") -> dict[str, Any]:
    """A row's values of :data:`COLUMNS` in the index of a folder, of which :func:`from_columns` makes it again."""
    height, width = row.size or (None, None)
    values: dict[str, Any] = {name: getattr(row, name) for name in COLUMNS if hasattr(row, name)}
    values |= {"height": height, "width": width}
    for name, by in _PROMPTS.items():
        values[name], values[by] = _prompt_columns(values[name], folder)
    values["label"] = None if row.label is None else storable(row.label)
    values["image"] = None if row.image is None else _path(row.image, folder)
    conditions = [_path(source, folder) for source in row.conditions]
    values["conditions"] = json.dumps(conditions) if conditions else None
    for name in ("adapter", *_PAIRS):
        values[name] = None if values[name] is None else json.dumps(values[name])
    return values


def from_columns(values: Mapping[str, Any], folder: str | os.PathLike[str] = ".") -> GenerateRow:
    """The row of a row of a folder's index: :func:`columns` and the name; other columns are left out.

    Raises:
        ValueError: an image, or an image as a prompt, that was given as an object, which is nowhere to be found again;
            a file of images as prompts that cannot be read.
    """
    found: dict[str, Any] = {
        name: values.get(name) for name in COLUMNS if name not in ("height", "width", "conditions", *_PROMPTS.values())
    }
    for name, by in _PROMPTS.items():
        if (place := values.get(by)) is not None:
            found[name] = _image_prompt(name, place, folder)
    for name in ("adapter", *_PAIRS):
        found[name] = None if found[name] is None else tuple(json.loads(found[name]))
    height, width = values.get("height"), values.get("width")
    found["size"] = None if height is None or width is None else (height, width)
    paths = json.loads(values.get("conditions") or "[]")
    if "" in (*paths, found["image"]):
        raise ValueError("image: it was given as an object and not as a file, so the row cannot be made again")
    found["image"] = None if found["image"] is None else Path(folder, found["image"])
    return GenerateRow(**found, conditions=tuple(Path(folder, path) for path in paths), name=values.get("name") or "")


def _prompt_columns(prompt: Prompt | None, folder: str | os.PathLike[str]) -> tuple[str | None, str | None]:
    """A prompt as the index has it, and where it is to be found if it is an image."""
    if not isinstance(prompt, ImagePrompt):
        return None if prompt is None else storable(prompt), None
    place = [(_path(file, folder), row) for file, row in prompt.sources]
    return storable(prompt.name), json.dumps(place[0]) if place else ""


def _image_prompt(name: str, place: str, folder: str | os.PathLike[str]) -> ImagePrompt:
    if not place:
        raise ValueError(f"{name}: it was given as an object and not from a file, so the row cannot be made again")
    file, row = json.loads(place)
    prompts = ImagePrompt.load(Path(folder, file))
    if row >= len(prompts):
        raise ValueError(f"{name}: {file} has {len(prompts)} image prompts, expected more than {row}")
    return prompts[row]


def _path(source: ImageSource, folder: str | os.PathLike[str]) -> str:
    if not isinstance(source, os.PathLike):
        return ""
    path = Path(source)
    # ".." leads out of where a link leads to, so that links are followed first.
    seen = path if path.is_absolute() else os.path.relpath(path.parent.resolve() / path.name, os.path.realpath(folder))
    return storable(os.fspath(seen))
