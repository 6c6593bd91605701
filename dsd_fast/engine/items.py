"""The inputs of a job, each with its id and its name."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dsd_fast.images import ImageError, ImageSource, Taken, load_image
from dsd_fast.images.batch import ahead
from dsd_fast.images.header import HeaderError, read_header
from dsd_fast.images.load import MAX_BYTES
from dsd_fast.jobs import file_digest, row_id, storable
from dsd_fast.models.errors import ModelError
from dsd_fast.models.prompts import token_limit, tokenize

if TYPE_CHECKING:
    from dsd_fast.models import Model

# Reading files waits more than it works.
_READERS = 4
_READ_AHEAD = 16

# Below what decoding holds at once, so that chunks have the size asked for.
_PIXEL_BYTES = 32 << 20

PromptCheck = Callable[[str], tuple[str, str] | None]

# Digest of the content, height, width.
_Known = tuple[str, int | None, int | None]


@dataclass(frozen=True)
class Item:
    """An input.

    Attributes:
        id: from the image's content, the prompt, the seed and the name.
        name: of its files.
        source: the image.
        prompt: that it is extracted with.
        columns: of the index: path, prompt, seed, height, width.
        refusal: reason and message of what makes it unusable whatever the image; or None.
    """

    id: str
    name: str
    source: Any
    prompt: str
    columns: dict[str, Any] = field(default_factory=dict)
    refusal: tuple[str, str] | None = None


# Halves of surrogate pairs, but for those that stand for bytes of a name.
_NO_NAME = re.compile("[\ud800-\udc7f\udd00-\udfff]")

COLUMNS = {"path": "string", "prompt": "string", "seed": "int64", "height": "int32", "width": "int32"}
"""Of the index: the file, or null; the prompt; the seed; the image's size as its header says, or null."""


class Items:
    """Iterates over the inputs in their order; files are read by threads, a few ahead.

    Args:
        images: consumed as they are asked for.
        prompts: one for all, or one each.
        names: one each; None: a file's name without its ending, a position for other images.
        check: says what is wrong with a prompt, or None, see :func:`prompt_check`.

    Raises:
        ValueError: one image instead of several; a prompt or a name that is no str; another number of them than of
            images, at once where ``images`` has a length, else when it is reached.
    """

    def __init__(
        self,
        images: Iterable[ImageSource],
        prompts: str | Sequence[str],
        seed: int,
        names: Sequence[str] | None,
        check: PromptCheck,
    ) -> None:
        if isinstance(images, str | bytes | os.PathLike) or not isinstance(images, Iterable):
            raise ValueError(f"images: got one {type(images).__name__}, expected a sequence of images")
        self._images, self._prompts, self._seed, self._names, self._check = images, prompts, seed, names, check
        for what, given in (("prompts", prompts), ("names", names)):
            if given is None or (what == "prompts" and isinstance(given, str)):
                continue
            if isinstance(given, str):
                raise ValueError(f"names: got the str {given[:80]!r}, expected a sequence of them")
            if isinstance(images, Sequence) and len(given) != len(images):
                raise ValueError(f"{what}: got {len(given)} for {len(images)} images, expected one each")
            for number, each in enumerate(given):
                if not isinstance(each, str):
                    raise ValueError(f"{what}[{number}] is of type {type(each).__name__}, expected str")

    def __iter__(self) -> Iterator[Item]:
        read = ahead(read_source, self._images, workers=_READERS, read_ahead=_READ_AHEAD, name="dsd-read")
        for number, (source, known) in enumerate(read):
            yield self._item(number, source, known)

    def _item(self, number: int, source: ImageSource, known: _Known) -> Item:
        prompt, refusal = self._prompts, None
        if not isinstance(prompt, str):
            prompt = _of("prompts", prompt, number)
            # Here, in the caller's thread: tokenizers are for one at a time.
            wrong = self._check(prompt)
            refusal = None if wrong is None else (f"prompt-{wrong[0]}", wrong[1])
        path = Path(source) if isinstance(source, os.PathLike) else None
        if self._names is not None:
            name = _of("names", self._names, number)
        else:
            name = str(number) if path is None else path.stem
        digest, height, width = known
        columns = {
            "path": None if path is None else storable(str(path)),
            "prompt": storable(prompt),
            "seed": self._seed,
            "height": height,
            "width": width,
        }
        return Item(row_id(digest, prompt, str(self._seed), name), name, source, prompt, columns, refusal)


class Names:
    """Refuses two inputs whose files would have one name.

    Args:
        taken: name → id of those that have their files, as the index has them.
    """

    def __init__(self, taken: Mapping[str, str]) -> None:
        self._taken = {_path(name): row for name, row in taken.items()}

    def check(self, item: Item) -> str:
        """The item's id.

        Raises:
            ValueError: its name is that of another input, or no path below a folder.
        """
        path = PurePosixPath(item.name)
        wrong = not path.name or path.is_absolute() or ".." in path.parts or "\0" in item.name
        if wrong or _NO_NAME.search(item.name):
            raise ValueError(f"names: got {item.name!r}, expected a path below the folder")
        if self._taken.setdefault(_path(item.name), item.id) != item.id:
            raise ValueError(
                f"names: {item.name!r} stands for several inputs, and their files would have one name; give names, or "
                "the layout 'shards'"
            )
        return item.id


def prompt_check(model: Model) -> PromptCheck:
    """Says of a prompt why the model's text encoders do not take it ("too-long" or "no-text", a sentence), or None."""
    limit = token_limit(model.tokenizers, model.text_encoders)

    @lru_cache(1024)
    def check(prompt: str) -> tuple[str, str] | None:
        try:
            for tokenizer in model.tokenizers:
                tokenize(tokenizer, [prompt], limit)
        except ValueError as error:
            reason = "too-long" if isinstance(error, ModelError) else "no-text"
            return reason, str(error).replace("prompts[0]", "the prompt", 1)
        return None

    return check


def images_of_a_shard(rows: int, most: int, size: tuple[int, int]) -> int:
    """Tell how many images to compute together, of (height, width) pixels: as many as divide a shard's rows.

    A shard that is begun anew then has the batches that it had. On a CPU it then has the same bits, too; a GPU's
    kernels need not add in the same order in every run.

    Args:
        rows: of a shard.
        most: that memory allows.
    """
    height, width = size
    most = min(most, _PIXEL_BYTES // (12 * height * width))
    return next(count for count in range(max(1, min(most, rows)), 0, -1) if rows % count == 0)


def _path(name: str) -> str:
    """A name as the index has it, and without what leads to the same file."""
    return storable(str(PurePosixPath(name)))


def _of(what: str, given: Sequence[str], number: int) -> str:
    if number >= len(given):
        raise ValueError(f"{what}: got {len(given)}, expected one for each image")
    return given[number]


def read_source(source: ImageSource) -> tuple[ImageSource, _Known]:
    """An image out of its owner's reach, and its content's digest, height and width; None of what says no size."""
    return (source, _from_file(Path(source))) if isinstance(source, os.PathLike) else _from_object(source)


def _from_file(path: Path) -> _Known:
    """Digest, height and width; of what cannot be read the digest of its path, and loading it says why."""
    unread = row_id("unread", str(path)), None, None
    try:
        status = path.stat()
        # Else reading might never end.
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            return unread
        digest = file_digest(path)
        with path.open("rb") as file:
            _, width, height = read_header(file, status.st_size)
    except HeaderError:
        return digest, None, None
    except (OSError, ValueError):
        return unread
    return digest, height, width


def _from_object(source: Any) -> tuple[ImageSource, _Known]:
    """Of the pixels that the digest was made of, the image too."""
    try:
        image = load_image(source)
    except ImageError as error:
        return Taken(error), (row_id(error.reason), None, None)
    digest = row_id(f"{image.width} {image.height}", image.tobytes())
    return Taken(image), (digest, image.height, image.width)
