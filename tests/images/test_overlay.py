"""Heat maps over images: colours, sizes, and the panel with its texts."""

import numpy as np
import pytest
from PIL import Image

from dsd_fast.images.overlay import colours, enlarged, overlay
from dsd_fast.images.panel import panel


def test_colours_go_evenly_from_dark_to_light():
    found = colours(np.linspace(0, 1, 256)).astype(float)
    assert found[0].tolist() == [0, 0, 4]
    assert found[128 + 0].tolist() == pytest.approx([188, 55, 84], abs=1)
    assert found[-1].tolist() == [252, 255, 164]
    # CIE L* of the sRGB colours.
    linear = np.where(found / 255 <= 0.04045, found / 255 / 12.92, ((found / 255 + 0.055) / 1.055) ** 2.4)
    light = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(light > 0.008856, 116 * np.cbrt(light) - 16, 903.3 * light)
    assert (np.diff(lightness) > 0).all()
    assert colours(np.array([-1, 2, np.nan])).tolist() == [[0, 0, 4], [252, 255, 164], [0, 0, 4]]
    assert colours(np.zeros((2, 3))).shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (256, 256)),
        ((28, 28), (280, 280)),
        ((100, 60), (500, 300)),
        ((300, 400), (300, 400)),
        ((2000, 1000), (512, 256)),
        ((200, 512), (200, 512)),
        ((10_000, 10), (512, 1)),
        ((1, 1), (256, 256)),
    ],
)
def test_sizes(size, expected):
    assert enlarged(Image.new("RGB", size)).size == expected


def test_small_pictures_keep_sharp_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    found = np.asarray(enlarged(Image.fromarray(pixels)))
    assert np.array_equal(found, pixels.repeat(4, 0).repeat(4, 1))


def test_an_overlay_is_the_grey_picture_under_the_values_colours():
    image = Image.new("RGB", (256, 256), (200, 0, 0))
    values = np.zeros((8, 8), np.float32)
    values[:, 4:] = 0.5
    found = np.asarray(overlay(image, values, 0.5)).astype(float)
    grey = 64 + np.asarray(image.convert("L")).astype(float)[0, 0] / 2
    for column, share, cover in ((0, 0.0, 0.35), (255, 1.0, 0.9)):
        wanted = (1 - cover) * grey + cover * colours(np.array(share)).astype(float)
        np.testing.assert_allclose(found[:, column], np.broadcast_to(wanted, (256, 3)), atol=1)
    # Values count relative to `top`, and only those beyond it look alike.
    assert not np.array_equal(overlay(image, values / 2, 0.5), overlay(image, values, 0.5))
    assert np.array_equal(overlay(image, values * 2, 1.0), overlay(image, values, 0.5))
    assert overlay(Image.new("LA", (3, 5)), values, 1.0).mode == "RGB"
    bad = np.full((8, 8), np.nan, np.float32)
    assert np.array_equal(overlay(image, bad, 1.0), overlay(image, values * 0, 1.0))
    with pytest.raises(ValueError, match=r"values: got shape \(8,\)"):
        overlay(image, values[0], 1.0)
    with pytest.raises(ValueError, match="top: got 0"):
        overlay(image, values, 0)


MARK = (255, 224, 130)


def marks(sheet):
    """Bounding boxes' left edges and rows of the marked grounds."""
    return np.argwhere((np.asarray(sheet) == MARK).all(-1))


def test_a_panel_has_a_picture_for_each_map_and_marks_its_word():
    image = Image.new("RGB", (64, 64), (0, 0, 255))
    caption = "a red ring"
    maps = [((0, 1), np.zeros((8, 8), np.float32)), ((6, 10), np.ones((8, 8), np.float32))]
    sheet = panel(image, caption, maps, 1.0)
    pixels = np.asarray(sheet)
    step = 256 + 16
    assert np.array_equal(pixels[16 : 16 + 256, 16 : 16 + 256], np.asarray(enlarged(image)))
    for number, (_, values) in enumerate(maps, start=1):
        left = 16 + number * step
        assert np.array_equal(pixels[16 : 16 + 256, left : left + 256], np.asarray(overlay(image, values, 1.0)))
    found = marks(sheet)[:, 1]
    # The first word of the second picture's caption, the last of the third one's; none under the image itself.
    first, last = found[found < 16 + 2 * step - 16], found[found >= 16 + 2 * step - 16]
    assert 16 + step - 3 <= first.min() <= first.max() < 16 + step + 20
    assert last.min() > 16 + 2 * step + 25
    assert found.min() > 16 + 256
    # Dark text below the pictures.
    assert (pixels[16 + 256 + 4 : 16 + 256 + 30].max(-1) < 60).any()


@pytest.mark.parametrize("caption", ["", "x" * 300, "a\nb\tc \x1b[2J \u202ered 熊", " ".join(["word"] * 70)])
def test_a_panel_takes_any_caption(caption):
    spans = [(0, min(3, len(caption)))] * 5
    sheet = panel(Image.new("RGB", (64, 64)), caption, [(span, np.ones((8, 8))) for span in spans], 1.0)
    assert sheet.width == 4 * (256 + 16) + 16
    assert sheet.height > 2 * 256
    if caption:
        assert len(marks(sheet)) > 0
