"""Canny's edges against hand computation: the Sobel filter answers a vertical step of height d with 4 d."""

import sys

import numpy as np
import pytest
from PIL import Image

from dsd_fast.images import ImageError
from dsd_fast.images.canny import canny

pytest.importorskip("cv2")


def picture(rows):
    """A step in the red channel between columns 3 and 4, of the height that each row says."""
    pixels = np.full((len(rows), 8, 3), 20, np.uint8)
    pixels[:, 4:, 0] += np.array(rows, np.uint8)[:, None]
    return Image.fromarray(pixels)


def edges(image, **options):
    found = canny(image, **options)
    assert found.mode == "RGB"
    assert found.size == image.size
    values = np.asarray(found)
    assert set(np.unique(values)) <= {0, 255}
    assert (values == values[..., :1]).all()
    return [list(map(int, np.flatnonzero(row))) for row in values[..., 0]]


def test_an_edge_starts_above_the_high_threshold():
    # 4 · 51 = 204 is above 200 and 4 · 50 = 200 is not. Columns 3 and 4 have equal gradients; the first stays.
    assert edges(picture([51] * 6)) == [[3]] * 6
    assert edges(picture([50] * 6)) == [[]] * 6
    assert edges(picture([50] * 6), low=0, high=199) == [[3]] * 6


def test_an_edge_goes_on_above_the_low_threshold():
    # The height falls by 4 a row. At height h column 4 has 4 h + 3 · 8, more than column 3's 4 h + 8: above 200 from
    # 48 on, and above 100 from 20 on, where the edge that began above goes on.
    assert edges(picture(range(60, 8, -4))) == [[4]] * 11 + [[]] * 2
    # The weak part alone is no edge.
    assert edges(picture(range(40, 8, -4))) == [[]] * 8


def test_other_modes_are_converted():
    # White beneath what is transparent: a step of 235 where the right half is opaque.
    rgba = Image.fromarray(np.full((6, 8, 4), 20, np.uint8))
    alpha = np.zeros((6, 8), np.uint8)
    alpha[:, 4:] = 255
    rgba.putalpha(Image.fromarray(alpha))
    assert edges(rgba) == [[3]] * 6
    with pytest.raises(ImageError, match="mode F"):
        canny(Image.new("F", (8, 8)))


@pytest.mark.parametrize(("low", "high"), [(-1, 200), (200, 100), (float("nan"), 200)])
def test_thresholds_are_checked(low, high):
    with pytest.raises(ValueError, match=r"low and high are .*, expected 0 <= low <= high"):
        canny(picture([51]), low, high)


def test_without_opencv_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"pip install 'dsd-fast\[control\]'"):
        canny(picture([51]))
