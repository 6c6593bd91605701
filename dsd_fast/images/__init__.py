"""Decoding and resizing of images from untrusted files."""

from dsd_fast.images.batch import check_sources, decode, decode_chunks, drawn, load_batch, to_picture, to_tensor
from dsd_fast.images.errors import ImageError
from dsd_fast.images.load import MAX_BYTES, MAX_PIXELS, ImageSource, Taken, load_bytes, load_image, take

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "ImageError",
    "ImageSource",
    "Taken",
    "check_sources",
    "decode",
    "decode_chunks",
    "drawn",
    "load_batch",
    "load_bytes",
    "load_image",
    "take",
    "to_picture",
    "to_tensor",
]
