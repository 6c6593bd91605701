"""Groups as a file names them, and the image sources that the names become."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dsd_fast.images import ImageError, ImageSource, load_image
from dsd_fast.images.header import HeaderError, read_header
from dsd_fast.jobs import replacing
from dsd_fast.jobs.tables import image_path

_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Draft:
    """A group before its images are found.

    Attributes:
        place: the file and the row, as errors name them.
        images: file names as written, or the bytes of embedded images.
        texts, label, category, id: as in :class:`dsd_fast.matching.Group`; the id is "" where the file gives none.
    """

    place: str
    images: list[str | bytes]
    texts: list[str]
    label: int = 0
    category: str = ""
    id: str = ""

    def digest(self) -> str:
        """16 hex digits of what the group says: image names (of embedded images the SHA-256), texts and label."""
        names = [image if isinstance(image, str) else hashlib.sha256(image).hexdigest() for image in self.images]
        content = json.dumps([names, self.texts, self.label], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class ImageFinder:
    """Image names to sources; embedded images of equal bytes are one source.

    Args:
        folder: where relative names start.
        extract: where the bytes of embedded images are written; None decodes them at once and keeps the pixels.
    """

    def __init__(self, folder: Path, extract: Path | None) -> None:
        self.folder, self.extract = folder, extract
        self._decoded: dict[str, ImageSource] = {}

    def find(self, image: str | bytes, place: str) -> ImageSource:
        """The source of one image of the group at ``place``.

        Raises:
            ValueError: a name that is no file name, or bytes that are no image.
            OSError: the folder of extracted images cannot be written.
        """
        if isinstance(image, str):
            return image_path(self.folder, image, place)
        return self._embedded(image, place)

    def _embedded(self, data: bytes, place: str) -> ImageSource:
        digest = hashlib.sha256(data).hexdigest()
        if digest in self._decoded:
            return self._decoded[digest]
        try:
            kind, _, _ = read_header(io.BytesIO(data), len(data))
        except HeaderError as error:
            wrong = "is not JPEG, PNG or WebP" if error.reason == "unsupported-format" else "has a damaged header"
            raise ValueError(f"{place}: an embedded image {error.message or wrong}") from None
        name = f"{digest[:32]}.{_ENDINGS[kind]}"
        if self.extract is not None:
            file = self.extract / name
            if not file.is_file() or file.stat().st_size != len(data):
                self.extract.mkdir(parents=True, exist_ok=True)
                with replacing(file) as stream:
                    stream.write(data)
            return file
        # The safe decoder reads files.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / name
            file.write_bytes(data)
            try:
                self._decoded[digest] = load_image(file)
            except ImageError as error:
                raise ValueError(f"{place}: an embedded image cannot be used ({error.reason})") from None
        return self._decoded[digest]
