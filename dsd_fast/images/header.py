"""Format and size of an image file from its first bytes, without a decoder.

Pillow learns the size only from a header that is whole, and warns about large ones through the process-wide warning
filters, which threads cannot change safely. Reading the size first keeps bombs away from the decoder altogether.
"""

import re
import struct
from typing import BinaryIO

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_RIFF = b"RIFF"
_WEBP = b"WEBP"

# Start-of-frame markers: C0 to CF without the tables DHT (C4), JPG (C8) and DAC (CC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_END_OF_IMAGE = 0xD9
_JPEG_START_OF_SCAN = 0xDA
# TEM, the restarts and the start of the image have no content.
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})
# A marker that is neither a fill byte nor an escaped FF.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])")
# Of what decoders skip; within a file's own buffer.
_BLOCK = 4096


class HeaderError(Exception):
    """The first bytes tell no size that is read.

    Attributes:
        reason: as of an :class:`~dsd_fast.images.ImageError`: "unsupported-format", "truncated", or "corrupt" for a
            header that contradicts its format.
        message: what follows the file's name, where the reason alone does not tell it.
    """

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message


def read_header(file: BinaryIO, num_bytes: int) -> tuple[str, int, int]:
    """Format ("PNG", "JPEG" or "WEBP"), width and height of a file of `num_bytes`, read from position 0.

    Raises:
        HeaderError: see there.
    """
    file.seek(0)
    head = file.read(32)
    if head.startswith(_PNG):
        return ("PNG", *_png_size(head))
    if head.startswith(_JPEG):
        return ("JPEG", *_jpeg_size(file))
    if head.startswith(_RIFF) and _WEBP.startswith(head[8:12]):
        return ("WEBP", *_webp_size(head, num_bytes))
    if any(signature.startswith(head) for signature in (_PNG, _JPEG, _RIFF)):
        raise HeaderError("truncated")
    raise HeaderError("unsupported-format")


def _png_size(head: bytes) -> tuple[int, int]:
    if len(head) < 24:
        raise HeaderError("truncated")
    if head[12:16] != b"IHDR":
        raise HeaderError("corrupt")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def _jpeg_size(file: BinaryIO) -> tuple[int, int]:
    """Walks the segments (ITU T.81, annex B) up to the frame header; skips what lies between them, as libjpeg does."""
    file.seek(2)
    while True:
        marker = _next_marker(file)
        if marker in _JPEG_BARE:
            continue
        if marker in (_JPEG_END_OF_IMAGE, _JPEG_START_OF_SCAN):
            raise HeaderError("corrupt")
        (length,) = struct.unpack(">H", _exactly(file, 2))
        # It counts itself.
        if length < 2:
            raise HeaderError("corrupt")
        if marker in _JPEG_FRAMES:
            bits, height, width, channels = struct.unpack(">BHHB", _exactly(file, 6))
            if bits != 8 or channels not in (1, 3, 4):
                wrong = f"is a JPEG of {channels} channels with {bits} bits, expected 1, 3 or 4 with 8"
                raise HeaderError("unsupported-format", wrong)
            return width, height
        file.seek(length - 2, 1)


def _next_marker(file: BinaryIO) -> int:
    while block := file.read(_BLOCK):
        marker = _JPEG_MARKER.search(block)
        if marker is not None:
            file.seek(marker.end() - len(block), 1)
            return marker[1][0]
        if block.endswith(b"\xff") and len(block) > 1:
            file.seek(-1, 1)
    raise HeaderError("truncated")


def _webp_size(head: bytes, num_bytes: int) -> tuple[int, int]:
    """Canvas of a WebP container (RFC 9649, sections 2.5 to 2.7)."""
    if len(head) < 30 or struct.unpack("<I", head[4:8])[0] + 8 > num_bytes:
        raise HeaderError("truncated")
    kind, data = head[12:16], head[20:30]
    if kind == b"VP8X":
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if kind == b"VP8L" and data[0] == 0x2F:
        bits = int.from_bytes(data[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and data[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", data[6:10])
        return width & 0x3FFF, height & 0x3FFF
    raise HeaderError("corrupt")


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise HeaderError("truncated")
    return data
