"""Any accepted image source to an RGB Pillow image: every failure is an `ImageError`, and nothing global changes."""

import hashlib
import io
import os
import re
import stat
import struct
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Union

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dsd_fast.images.errors import ImageError
from dsd_fast.images.header import HeaderError, read_header
from dsd_fast.images.png import without_long_metadata

ImageSource = Union[os.PathLike[str], Image.Image, npt.NDArray[np.uint8], Tensor, "Taken"]

# Pillow's own threshold for warning about a decompression bomb: 256 MiB of RGB.
MAX_PIXELS = 1024**3 // 4 // 3
# More than any file within MAX_PIXELS needs, 16-bit RGBA without compression included.
MAX_BYTES = 1024**3

# Pillow's decoders report damage by any of these.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    AttributeError,
    struct.error,
    zlib.error,
    UnidentifiedImageError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

# A chunk that is too short for its kind is another damage.
_TRUNCATED = re.compile("truncated(?!.* chunk)", re.IGNORECASE)

_HEADERS = {
    "unsupported-format": "is not a JPEG, PNG or WebP file",
    "truncated": "ends inside its header",
    "corrupt": "has a damaged header",
}

_EXIF_ORIENTATION = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Taken:
    """An image as it was when it was taken: the object that it was given as may be a buffer that is filled again.

    Attributes:
        source: an array, a tensor or an RGB image that nobody else has; or what refuses it.
    """

    def __init__(self, source: Image.Image | npt.NDArray[Any] | Tensor | ImageError) -> None:
        self.source = source

    @cached_property
    def key(self) -> bytes:
        """A digest that is equal for equal contents of one kind."""
        source = self.source
        if isinstance(source, ImageError):
            return str(source).encode()
        if isinstance(source, Image.Image):
            about, content = f"image {source.size}", source.tobytes()
        elif isinstance(source, Tensor):
            about, content = f"{source.dtype} {source.shape}", source.flatten().view(torch.uint8).numpy().tobytes()
        else:
            about, content = f"array {source.dtype} {source.shape}", source.tobytes()
        return hashlib.blake2b(about.encode() + content, digest_size=32).digest()


def take(source: Any) -> Any:
    """Take an image's pixels out of its owner's reach: a path as it is, of a Pillow image, an array or a tensor a copy.

    A copy is a :class:`Taken`, which :func:`load_image` takes. A Pillow image is decoded here, and may be closed.
    """
    if isinstance(source, Image.Image):
        try:
            return Taken(load_image(source))
        except ImageError as error:
            return Taken(error)
    if isinstance(source, np.ndarray):
        return Taken(source.copy())
    if isinstance(source, Tensor):
        # Not a clone: the thread that reads it does not wait for the stream that the caller's work is on.
        return Taken(source.detach().to("cpu", copy=True))
    return source


def load_image(source: ImageSource) -> Image.Image:
    """An RGB image of 8 bits a channel.

    Files: JPEG, PNG and WebP by their content, whatever the name. The size is checked from the header before anything
    is decoded. Of an animation the first frame is taken, an EXIF orientation is applied, transparency is composited on
    white, 16-bit samples keep their high byte, CMYK is converted without a colour profile. PNG checksums are verified;
    JPEG and WebP have none, so damage that still decodes cannot be noticed there. A Pillow image whose mode does not
    say which value is white (F; I with values above 255; I;16 that no file has given, with none) is refused.

    Args:
        source: a `pathlib.Path`, a Pillow image (its current frame; it is not changed), a uint8 array (H, W, C) with 1,
            3 or 4 channels, or a float tensor (C, H, W) in [0, 1] with 1 or 3 channels, rounded to 8 bits. Not a str:
            strings are text everywhere in this package.

    Raises:
        ImageError: the source cannot be used; `.reason` says why.
    """
    if isinstance(source, str):
        message = f"source is the str {source[:80]!r}, and strings are text; use pathlib.Path for a file"
        raise ImageError("str", "unsupported-type", message)
    if isinstance(source, os.PathLike):
        return _from_file(Path(source))
    if isinstance(source, Taken):
        if isinstance(source.source, ImageError):
            raise source.source
        if isinstance(source.source, Image.Image):
            return source.source
        source = source.source
    if isinstance(source, Image.Image):
        return _from_pillow(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Tensor):
        return _from_tensor(source)
    raise _type_error(type(source).__name__)


def load_bytes(content: bytes, name: str) -> Image.Image:
    """An RGB image of what a file holds, as :func:`load_image` gives it of the file.

    Args:
        content: of a JPEG, PNG or WebP file.
        name: for errors.

    Raises:
        ImageError: the content cannot be used; `.reason` says why.
    """
    if not content:
        raise ImageError(name, "empty", f"{name} is empty")
    if len(content) > MAX_BYTES:
        raise ImageError(name, "too-large", f"{name} has {len(content)} bytes, the limit is {MAX_BYTES}")
    return _decode(io.BytesIO(content), name, len(content))


def _from_file(path: Path) -> Image.Image:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(path, "is-directory", f"{path} is a folder, expected an image file")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(path, "not-a-file", f"{path} is not a regular file")
        if status.st_size == 0:
            raise ImageError(path, "empty", f"{path} is empty")
        if status.st_size > MAX_BYTES:
            raise ImageError(path, "too-large", f"{path} has {status.st_size} bytes, the limit is {MAX_BYTES}")
        with path.open("rb") as file:
            return _decode(file, path, status.st_size)
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(path, "missing", f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        # ValueError: a path with a NUL byte.
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(path, "unreadable", f"{path} cannot be read: {text}") from error


def _decode(file: BinaryIO, path: Path | str, num_bytes: int) -> Image.Image:
    try:
        kind, width, height = read_header(file, num_bytes)
    except HeaderError as error:
        raise ImageError(path, error.reason, f"{path} {error.message or _HEADERS[error.reason]}") from None
    _check_size(path, width, height)
    try:
        try:
            return _pixels(file, kind, path)
        except ImageError:
            raise
        except ValueError:
            # Also what Pillow says of more metadata than it takes.
            short = without_long_metadata(file) if kind == "PNG" else None
            if short is None:
                raise
            return _pixels(short, kind, path)
    except ImageError:
        raise
    except _DECODER_ERRORS as error:
        if _TRUNCATED.search(str(error)) or not _has_end(file, kind, num_bytes):
            raise ImageError(path, "truncated", f"{path} ends before its last pixel") from error
        raise ImageError(path, "corrupt", f"{path} has a damaged {kind} stream") from error


def _pixels(file: BinaryIO, kind: str, path: Path | str) -> Image.Image:
    if kind == "PNG":
        # Only this looks at the checksums of the pixel data.
        file.seek(0)
        Image.open(file, formats=[kind]).verify()
    file.seek(0)
    with Image.open(file, formats=[kind]) as image:
        # The decoder may have found another size than the header reader.
        _check_size(path, *image.size)
        image.load()
        return _to_rgb(image, path)


def _has_end(file: BinaryIO, kind: str, num_bytes: int) -> bool:
    """Whether the file's end carries its format's end mark; WebP's length was checked with its header."""
    file.seek(max(0, num_bytes - 4096))
    tail = file.read()
    return {"PNG": b"IEND", "JPEG": b"\xff\xd9", "WEBP": b""}[kind] in tail


def _from_pillow(image: Image.Image) -> Image.Image:
    name = f"Pillow image ({image.mode}, {image.width} × {image.height})"
    if 0 in image.size:
        raise ImageError(name, "empty", f"{name} has no pixels")
    _check_size(name, *image.size)
    try:
        image.load()
    except _DECODER_ERRORS as error:
        reason = "truncated" if _TRUNCATED.search(str(error)) else "corrupt"
        raise ImageError(name, reason, f"{name} cannot be decoded: {error}") from error
    try:
        return _to_rgb(image, name)
    except ImageError:
        raise
    except _DECODER_ERRORS as error:
        raise ImageError(name, "unsupported-type", f"{name} cannot be converted to RGB: {error}") from error


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    name = f"array of shape {array.shape} and dtype {array.dtype}"
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise _type_error(name)
    if array.size == 0:
        raise ImageError(name, "empty", f"{name} has no pixels")
    pixels = np.ascontiguousarray(array)
    return _to_rgb(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), name)


def _from_tensor(tensor: Tensor) -> Image.Image:
    name = f"tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
    if not tensor.is_floating_point() or tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise _type_error(name)
    if tensor.numel() == 0:
        raise ImageError(name, "empty", f"{name} has no pixels")
    values = tensor.detach().to("cpu", torch.float32)
    low, high = float(values.amin()), float(values.amax())
    if not (low >= 0 and high <= 1):
        raise ImageError(name, "unsupported-type", f"{name} spans {low} to {high}, expected 0 to 1")
    pixels = values.mul(255).round().to(torch.uint8).permute(1, 2, 0)
    return _from_array(pixels.numpy())


def _to_rgb(image: Image.Image, source: Path | str) -> Image.Image:
    """A new RGB image: upright, opaque, 8 bits."""
    transposition = _TRANSPOSITIONS.get(_orientation(image))
    if image.mode.startswith("I"):
        flat = _from_integers(image, source)
    elif image.mode == "F":
        message = f"{source} has mode F, whose range is not known; give mode L or RGB, where 255 is white"
        raise ImageError(source, "unsupported-type", message)
    elif image.has_transparency_data:
        # Pillow has no way from premultiplied grey but this one.
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        flat = Image.new("RGB", image.size, "white")
        flat.paste(rgba, mask=rgba.getchannel("A"))
    else:
        flat = image.convert("RGB")
    # Metadata would turn the image once more when it is given back to this function.
    flat.info = {}
    return flat if transposition is None else flat.transpose(transposition)


def _from_integers(image: Image.Image, source: Path | str) -> Image.Image:
    """Greyscale of more bits than 8, whose transparency Pillow's own conversion does not know, nor more than 255.

    Of mode I;16 it is 65535 that is white, as in the files that it comes from. Mode I has 32 bits and no white: values
    up to 255 are taken as Pillow takes them.
    """
    grey = np.asarray(image).astype(np.int64)
    low, high, wide = int(grey.min()), int(grey.max()), image.mode != "I"
    if not wide and not 0 <= low <= high <= 0xFF:
        message = f"{source} has mode I and values from {low} to {high}, and nothing says which is white"
        expected = "give mode L, where 255 is, or I;16, where 65535 is"
        raise ImageError(source, "unsupported-type", f"{message}; {expected}")
    # A file of 16 bits may be that dark; what somebody has made has rather been 8 bits before.
    if wide and image.format is None and 0 < high <= 0xFF:
        message = f"{source} has mode {image.mode}, where 65535 is white, and no value above {high}"
        raise ImageError(source, "unsupported-type", f"{message}; give mode L, by convert('L') if 255 is white")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[grey == transparent] = 0xFFFF if wide else 0xFF
    return Image.fromarray((grey >> 8 if wide else grey).astype(np.uint8)).convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _DECODER_ERRORS:
        # The pixels are good; only the note about how they were taken is not.
        return 1
    return value if isinstance(value, int) else 1


def _check_size(source: Path | str, width: int, height: int) -> None:
    limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    if width * height > limit:
        raise ImageError(source, "too-large", f"{source} has {width} × {height} pixels, the limit is {limit} in all")


def _type_error(given: str) -> ImageError:
    return ImageError(
        given,
        "unsupported-type",
        f"source is a {given}, expected a pathlib.Path, a Pillow image, a uint8 array (H, W, C) with 1, 3 or 4 "
        "channels, or a float tensor (C, H, W) in [0, 1] with 1 or 3 channels",
    )
