"""PNG files with more metadata than Pillow takes."""

import io
import struct
import zlib
from typing import BinaryIO

from PIL import PngImagePlugin

_SIGNATURE_BYTES = 8
_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def without_long_metadata(file: BinaryIO) -> BinaryIO | None:
    """The PNG file without those texts and colour profiles that are beyond Pillow's limits; None where none is.

    Pillow guards against compressed texts that grow without end (``PngImagePlugin.MAX_TEXT_CHUNK`` bytes of each,
    ``MAX_TEXT_MEMORY`` of all) by refusing the file, whose pixels may be whole: programs keep whole workflows there.
    Nothing beyond the limits is unpacked here either. What is left out has a right checksum.
    """
    file.seek(0)
    short, left_out, total = io.BytesIO(), False, 0
    short.write(file.read(_SIGNATURE_BYTES))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        content = file.read(length + 4)
        if kind in _METADATA and content[length:] == struct.pack(">I", zlib.crc32(content[:length], zlib.crc32(kind))):
            size = _unpacked(kind, content[:length])
            if size is None or total + size > PngImagePlugin.MAX_TEXT_MEMORY:
                left_out = True
                continue
            total += size
        short.write(head + content)
    return short if left_out else None


def _unpacked(kind: bytes, content: bytes) -> int | None:
    """Bytes of text in a chunk (ISO/IEC 15948, 11.3.3 and 11.3.4); None for a compressed one that is too long."""
    rest = content.partition(b"\0")[2]
    compressed = kind != b"tEXt"
    if kind == b"iTXt":
        # A flag, the method, the language and the keyword translated.
        compressed = rest[:1] != b"\0"
        rest = rest[2:].split(b"\0", 2)[-1]
    elif compressed:
        # The method.
        rest = rest[1:]
    if not compressed:
        return len(rest)
    unpacking = zlib.decompressobj()
    try:
        size = len(unpacking.decompress(rest, PngImagePlugin.MAX_TEXT_CHUNK))
    except zlib.error:
        return 0
    if unpacking.unconsumed_tail:
        return None
    return 0 if kind == b"iCCP" else size
