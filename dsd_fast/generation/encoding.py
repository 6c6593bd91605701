"""Pictures to files in memory, by a small pool of threads beside what computes them."""

from __future__ import annotations

import io
import json
import math
import os
import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from dsd_fast.generation.marks import packet
from dsd_fast.jobs import Timeline, storable

QUALITY = {"png": None, "jpg": 95, "webp": 95}
"""Format → the quality it has unless another is asked for; PNG loses nothing."""
SAMPLE_NAMES = {"image": "source_image"}
"""Column of the index → its name beside a picture, where "image" is the picture."""

# Pixels of a side; libpng itself holds more than memory does.
_LARGEST = {"jpg": 65_500, "webp": 16_383}
# Of photographs at 512 px, level 6 (zlib's own) takes twice as long for 1 % less, level 1 half as long for 9 % more.
_PNG_LEVEL = 4
_MOST_THREADS = 4
_NO_CLASS = -1
_HALVES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Encoded:
    """A sample: the content of its files.

    Attributes:
        image: in the format asked for.
        text: the prompt.
        json: what the row says, as :func:`described` has it.
        cls: the index of its class in digits, -1 without one.
    """

    image: bytes
    text: str
    json: bytes
    cls: bytes


class Encoder:
    """A pool of threads that encode pictures; a context manager, whose end waits for all of them.

    Equal pictures and rows give equal bytes.

    Args:
        format: "png", "jpg" (4:4:4: small pictures show what halved chroma loses) or "webp" (lossy).
        quality: 1 to 100, of "jpg" and "webp"; None: as :data:`QUALITY`.
        mark: whether each image says which model made it, from which seed, and that it is synthetic
            (:mod:`dsd_fast.generation.marks`).
        about: JSON of each sample beside its row: "model", the model's name, and whatever else is the same for all.
        timeline: gets the spans "encode-0", "encode-1", …, one name a thread.
        threads: None: one per core, 4 at most.

    Raises:
        ValueError: an argument that does not fit, by name.
    """

    def __init__(
        self,
        format: str = "png",
        quality: int | None = None,
        *,
        mark: bool = True,
        about: Mapping[str, Any],
        timeline: Timeline,
        threads: int | None = None,
    ) -> None:
        check_format(format, quality)
        self.format, self.quality, self.mark, self.about = format, quality or QUALITY[format], mark, dict(about)
        if "model" not in self.about:
            raise ValueError(f"about: got {', '.join(self.about) or 'nothing'}, expected the model's name as model")
        self._timeline = timeline
        self.threads = min(os.cpu_count() or 1, _MOST_THREADS) if threads is None else threads
        # What waits is raw pixels: it is bounded, and so is memory, however slow the encoding is.
        self._room = threading.BoundedSemaphore(2 * self.threads)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="encode")

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Of an error too: few are on their way, and a shard that is complete waits for them to be written.
        self._pool.shutdown()

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuses pictures of (height, width) pixels that the format cannot hold.

        Raises:
            ValueError: such a size.
        """
        largest = _LARGEST.get(self.format)
        if largest is not None and max(size) > largest:
            raise ValueError(f"size: got {size}, expected sides of at most {largest} pixels, which {self.format} holds")

    def submit(self, pixels: np.ndarray, row: Mapping[str, Any]) -> Future[Encoded]:
        """Encodes a picture in another thread, after a wait while twice as many pictures as threads are on their way.

        Args:
            pixels: (H, W, 3) uint8, not to be filled again.
            row: its columns: "prompt", and "seed" and "cls" where it has them; "id" and all others go into the JSON.

        Returns:
            The sample, or what encoding it raised.

        Raises:
            ValueError: pixels of another shape or dtype.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(f"pixels: got {pixels.dtype} {pixels.shape}, expected uint8 (H, W, 3)")
        self._room.acquire()
        try:
            sample = self._pool.submit(self._sample, pixels, dict(row))
        except BaseException:
            self._room.release()
            raise
        # Also called of one that is cancelled before it begins.
        sample.add_done_callback(lambda _: self._room.release())
        return sample

    def _sample(self, pixels: np.ndarray, row: dict[str, Any]) -> Encoded:
        with self._timeline.span(threading.current_thread().name.replace("_", "-")):
            cls = row.get("cls")
            return Encoded(
                self._image(pixels, row.get("seed")),
                storable(row["prompt"]),
                json_bytes({**self.about, **described(row)}),
                str(_NO_CLASS if cls is None else int(cls)).encode(),
            )

    def _image(self, pixels: np.ndarray, seed: int | None) -> bytes:
        image, content = Image.fromarray(pixels), io.BytesIO()
        mark = packet(str(self.about["model"]), seed) if self.mark else None
        if self.format == "png":
            chunks = PngImagePlugin.PngInfo()
            if mark is not None:
                chunks.add_itxt("XML:com.adobe.xmp", mark.decode())
            image.save(content, "PNG", compress_level=_PNG_LEVEL, pnginfo=chunks)
        else:
            options: dict[str, Any] = {"quality": self.quality} | ({} if mark is None else {"xmp": mark})
            if self.format == "jpg":
                image.save(content, "JPEG", subsampling="4:4:4", **options)
            else:
                image.save(content, "WEBP", **options)
        return content.getvalue()


def check_format(format: str, quality: int | None) -> None:
    """Refuses a format that there is not, and a quality that it has not.

    Raises:
        ValueError: by name.
    """
    if format not in QUALITY:
        raise ValueError(f"format: got {format!r}, expected one of {', '.join(QUALITY)}")
    if quality is None:
        return
    if QUALITY[format] is None:
        raise ValueError(f"quality: got {quality} for {format}, which loses nothing; expected none")
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise ValueError(f"quality: got {quality!r}, expected an integer from 1 to 100")


def described(row: Mapping[str, Any]) -> dict[str, Any]:
    """Tell a row's columns as JSON that every reader takes: what is not set is left out, and so are bytes.

    A null where other rows have a value spoils the types that readers infer. The seed is in decimal digits within a
    string, since most of them lose digits beyond 2**53; the source image's path goes by a name that is no picture's.
    """
    told = {
        SAMPLE_NAMES.get(name, name): value
        for name, value in row.items()
        if not (value is None or isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)))
    }
    return told | ({"seed": str(told["seed"])} if "seed" in told else {})


def json_bytes(values: Any) -> bytes:
    """One line of JSON in UTF-8; of what is no text :func:`dsd_fast.jobs.storable`'s escapes."""
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    return _HALVES.sub(lambda half: f"\\\\u{ord(half[0]):04x}", text).encode()
