"""Heat maps laid over images, for people to look at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Every sixteenth part of matplotlib's inferno (Smith and van der Walt 2015, public domain), whose lightness grows
# evenly, so that equal steps of the values look equal, in grey and to colour-blind readers too.
_INFERNO = bytes.fromhex(
    "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 "
    "d04545 e35933 f1711f f98c0a fcaa0f f9c932 f2e865 fcffa4"
)
_TABLE = np.frombuffer(_INFERNO, np.uint8).reshape(-1, 3).astype(np.float64)

# Shown images are at least this wide or high, and none is wider or higher than the second.
_LEAST, _MOST = 256, 512
# How much of the colour covers the picture where the map is 0, and where it is largest.
_COVER = (0.35, 0.9)

Floats = NDArray[np.floating]


def colours(values: Floats) -> NDArray[np.uint8]:
    """Values from 0 to 1, clipped, in inferno's colours: (…) to (…, 3)."""
    place = np.clip(np.nan_to_num(values, nan=0.0), 0, 1) * (len(_TABLE) - 1)
    grid = np.arange(len(_TABLE))
    channels = [np.interp(place, grid, _TABLE[:, i]) for i in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)


def enlarged(image: Image.Image) -> Image.Image:
    """The image, of any mode, as RGB, its shorter side 256 pixels if it was smaller, its longer one 512 at most.

    Small pictures are magnified by whole numbers, so that each pixel stays a sharp square.
    """
    rgb = image.convert("RGB")
    short, long = sorted(rgb.size)
    if short < _LEAST and -(-_LEAST // short) * long <= _MOST:
        times = -(-_LEAST // short)
        return rgb.resize((rgb.width * times, rgb.height * times), Image.Resampling.NEAREST)
    if short < _LEAST or long > _MOST:
        factor = min(max(1.0, _LEAST / short), _MOST / long)
        size = (max(1, round(rgb.width * factor)), max(1, round(rgb.height * factor)))
        return rgb.resize(size, Image.Resampling.LANCZOS)
    return rgb


def overlay(image: Image.Image, values: Floats, top: float) -> Image.Image:
    """A heat map over an image: grey picture below, the map's colours above, more opaque where values are large.

    Args:
        image: of any size and mode.
        values: (h, w) map of the whole image, stretched to it.
        top: the value that gets the last colour; 0 gets the first. Maps drawn with one `top` may be compared.

    Returns:
        RGB image of the size of :func:`enlarged`.

    Raises:
        ValueError: a map that is not two-dimensional, or a `top` that is not above 0.
    """
    if values.ndim != 2:
        raise ValueError(f"values: got shape {values.shape}, expected (h, w)")
    if not top > 0:
        raise ValueError(f"top: got {top}, expected a number above 0")
    shown = enlarged(image)
    stretched = Image.fromarray(values.astype(np.float32)).resize(shown.size, Image.Resampling.BILINEAR)
    share = np.clip(np.nan_to_num(np.asarray(stretched, np.float64) / top, nan=0.0), 0, 1)
    # Half the contrast: the picture is there to find one's way, the colours to be read.
    grey = 64 + np.asarray(shown.convert("L"), np.float64)[..., None] / 2
    cover = (_COVER[0] + (_COVER[1] - _COVER[0]) * share)[..., None]
    return Image.fromarray(np.rint((1 - cover) * grey + cover * colours(share)).astype(np.uint8))
