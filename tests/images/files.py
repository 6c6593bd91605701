"""Image files, good and bad, written by hand or by Pillow."""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(width=40, height=30, seed=0):
    """A smooth RGB image with some noise, so that no two pixels, rows or corners are alike."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 20, (height, width))
    channels = [x * 230 // width + noise, y * 230 // height + noise, (x + y) * 230 // (width + height) + noise]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *, depth=8, colour=2, pixels=b"", extra=b""):
    """A PNG from raw scan lines, which Pillow cannot write in every mode; `extra` goes before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(pixels)) if pixels else b""
    return SIGNATURE + chunk(b"IHDR", header) + extra + body + chunk(b"IEND", b"")


def jpeg_header(width, height):
    """A JPEG up to its frame header."""
    return (
        b"\xff\xd8\xff\xe0\x00\x04ab"
        + b"\xff\xc0\x00\x11\x08"
        + struct.pack(">HH", height, width)
        + b"\x03"
        + b"\0" * 9
    )


def webp_header(width, height):
    """An extended WebP of that canvas, with nothing on it."""
    data = (
        b"VP8X"
        + struct.pack("<I", 10)
        + b"\0" * 4
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(data)) + b"WEBP" + data


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def refilled(kind: str, arrays: Sequence[np.ndarray]) -> Iterator[object]:
    """Pictures of one size, each in the buffer of the one before."""
    if kind == "array":
        buffer = np.empty_like(arrays[0])
        for array in arrays:
            buffer[:] = array
            yield buffer
    elif kind == "tensor":
        values = torch.empty(3, *arrays[0].shape[:2])
        for array in arrays:
            yield values.copy_(torch.from_numpy(array).permute(2, 0, 1) / 255)
    elif kind == "pillow":
        image = Image.new("RGB", arrays[0].shape[1::-1])
        for array in arrays:
            image.paste(Image.fromarray(array))
            yield image
    elif kind == "frames":
        file = io.BytesIO()
        first, *others = map(Image.fromarray, arrays)
        first.save(file, "WEBP", save_all=True, append_images=others, lossless=True)
        with Image.open(file) as image:
            for number in range(len(arrays)):
                image.seek(number)
                yield image
    elif kind == "files that are closed":
        for array in arrays:
            with Image.open(io.BytesIO(encoded(Image.fromarray(array), "PNG"))) as image:
                yield image
