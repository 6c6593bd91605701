import multiprocessing
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin

from dsd_fast.images import MAX_PIXELS, ImageError, load_image
from tests.images.files import SIGNATURE, chunk, encoded, jpeg_header, picture, png, webp_header, write

RGB = Image.fromarray(picture())
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def pixels(source):
    image = load_image(source)
    assert image.mode == "RGB"
    assert type(image) is Image.Image
    return np.asarray(image)


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


# Good files


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_load_by_content_whatever_the_name(kind, tmp_path):
    data = encoded(RGB, kind, **({"lossless": True} if kind == "WEBP" else {}))
    path = write(tmp_path, "picture.txt", data)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels(path), expected)
    if kind != "JPEG":
        assert np.array_equal(expected, picture())


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"progressive": True}), ("WEBP", {"quality": 80}), ("WEBP", {"lossless": True, "exact": True})],
)
def test_load_other_encodings(kind, options, tmp_path):
    path = write(tmp_path, "x", encoded(RGB, kind, **options))
    assert np.abs(pixels(path).astype(int) - picture()).mean() < 10


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_load_first_frame_of_an_animation(kind, tmp_path):
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    options = {"save_all": True, "append_images": frames[1:], "duration": 50}
    if kind == "WEBP":
        options["lossless"] = True
    path = write(tmp_path, "x", encoded(frames[0], kind, **options))
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert np.array_equal(pixels(path), picture(seed=0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_load_applies_exif_orientation(kind, orientation, tmp_path):
    stored = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    path = write(tmp_path, "x", encoded(RGB, kind, exif=exif, **options))
    # EXIF 2.3, table 6: what row 0 and column 0 of the stored image are in the upright one.
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: stored.swapaxes(0, 1)[:, ::-1],
        7: stored.swapaxes(0, 1)[::-1, ::-1],
        8: stored.swapaxes(0, 1)[::-1],
    }[orientation]
    result = pixels(path)
    # What has been turned upright stays so.
    assert np.array_equal(np.asarray(load_image(load_image(path))), result)
    assert result.shape == upright.shape
    assert np.abs(result.astype(int) - upright).max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_load_ignores_broken_exif(kind, exif, tmp_path):
    path = write(tmp_path, "x", encoded(RGB, kind, exif=exif))
    assert pixels(path).shape == (30, 40, 3)


@pytest.mark.parametrize(
    "stray", [b"\0", b"\xff" * 3, b"\xff\0", b"\xff\xd0", b"scanner\0" * 700, b"\0" * 4087 + b"\xff"], ids=len
)
def test_load_jpeg_with_stray_bytes_between_segments(stray, tmp_path):
    data = encoded(RGB, "JPEG")
    first = 4 + int.from_bytes(data[4:6], "big")
    frame = data.index(b"\xff\xc0")
    for cut in (first, frame):
        path = write(tmp_path, "x.jpg", data[:cut] + stray + data[cut:] + b"sent by mail\xff\xd8" * 9)
        assert np.array_equal(pixels(path), pixels(write(tmp_path, "y.jpg", data)))


def long_metadata():
    """Name → options of Pillow's for a PNG whose pixels are whole, and which Pillow's limits refuse."""
    options = {}
    for name in ("zTXt", "iTXt"):
        info = PngImagePlugin.PngInfo()
        add = info.add_text if name == "zTXt" else info.add_itxt
        add("workflow", "A" * (2 << 20), zip=True)
        options[name] = {"pnginfo": info}
    info = PngImagePlugin.PngInfo()
    for number in range(3):
        info.add(b"tEXt", b"part\0" + b"A" * 30, after_idat=number > 1)
    return {**options, "tEXt": {"pnginfo": info}, "iCCP": {"icc_profile": bytes(3 << 20)}}


@pytest.mark.parametrize("name", ["zTXt", "iTXt", "tEXt", "iCCP"])
def test_load_png_with_metadata_beyond_pillows_limits(name, tmp_path, monkeypatch):
    if name == "tEXt":
        monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(RGB, "PNG", exif=exif, **long_metadata()[name])
    assert name.encode() in data
    path = write(tmp_path, "x.png", data)
    with pytest.raises(ValueError, match=r"text chunks|MAX_TEXT_CHUNK"), Image.open(path) as image:
        image.load()
    # Turned by the note that is no text.
    assert np.array_equal(pixels(path), np.rot90(picture(), -1))
    # It is left out where it is whole alone, and nothing else is.
    for place, reason in ((data.index(name.encode()) + 30, "corrupt"), (data.index(b"IDAT") + 300, "corrupt")):
        with pytest.raises(ImageError) as info:
            load_image(write(tmp_path, "y.png", flipped(data, place)))
        assert info.value.reason == reason
    with pytest.raises(ImageError, match="ends before its last pixel"):
        load_image(write(tmp_path, "z.png", data[: data.index(b"IDAT") + 300]))


def test_load_webp_with_metadata_and_more_behind_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(RGB, "WEBP", lossless=True, exif=exif, icc_profile=bytes(3001), xmp=b"<x/>")
    assert np.array_equal(pixels(write(tmp_path, "x.webp", data + b"sent by mail")), np.rot90(picture(), -1))


def test_load_16_bit_grey_is_scaled(tmp_path):
    grey = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    path = write(tmp_path, "x.png", encoded(Image.fromarray(grey), "PNG"))
    result = pixels(path)
    # One step for taking the high byte where division by 257 would round.
    assert np.abs(result.astype(float) - grey[..., None] / 257).max() <= 1
    assert (result.min(), result.max()) == (0, 255)
    assert np.array_equal(result, pixels(Image.fromarray(grey)))
    # As the refusal of mode I advises.
    assert np.array_equal(result, pixels(Image.fromarray(grey.astype(np.int32)).convert("I;16")))


def test_load_16_bit_colour_equals_grey(tmp_path):
    grey = np.linspace(0, 65535, 1200).astype(">u2").reshape(30, 40)
    lines = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in grey)
    path = write(tmp_path, "x.png", png(40, 30, depth=16, pixels=lines))
    assert np.array_equal(pixels(path), pixels(Image.fromarray(grey.astype(np.uint16))))


def test_load_16_bit_grey_with_a_transparent_value(tmp_path):
    lines = b"".join(b"\0" + np.array([0, 1000, 30000], ">u2").tobytes() for _ in range(2))
    path = write(tmp_path, "x.png", png(3, 2, depth=16, colour=0, pixels=lines, extra=chunk(b"tRNS", b"\x03\xe8")))
    assert pixels(path)[0, :, 0].tolist() == [0, 255, 30000 >> 8]


def test_load_palette(tmp_path):
    image = RGB.quantize(16)
    path = write(tmp_path, "x.png", encoded(image, "PNG"))
    assert np.array_equal(pixels(path), np.asarray(image.convert("RGB")))
    assert len(np.unique(pixels(path).reshape(-1, 3), axis=0)) == 16


def test_load_palette_with_transparency_is_white_there(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    path = write(tmp_path, "x.png", encoded(image, "PNG", transparency=b"\xff\x00\x80"))
    result = pixels(path)
    assert result[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    # Half transparent: alpha 128 / 255 of the colour, the rest white, within rounding.
    expected = np.array([70, 80, 90]) * 128 / 255 + 255 * 127 / 255
    assert np.abs(result[1, 0] - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_load_alpha_is_composited_on_white(kind, mode, tmp_path):
    array = np.zeros((2, 2, len(mode)), np.uint8)
    array[..., -1] = [[0, 255], [128, 255]]
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    path = write(tmp_path, "x", encoded(Image.fromarray(array, mode), kind, **options))
    assert pixels(path)[..., 0].tolist() == [[255, 0], [127, 0]]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_load_grey(mode, tmp_path):
    image = RGB.convert(mode)
    path = write(tmp_path, "x.png", encoded(image, "PNG"))
    assert np.array_equal(pixels(path), np.asarray(image.convert("L"))[..., None].repeat(3, 2))


def test_load_colour_key_transparency(tmp_path):
    key = tuple(int(v) for v in picture()[0, 0])
    path = write(tmp_path, "x.png", encoded(RGB, "PNG", transparency=key))
    expected = picture()
    expected[(expected == key).all(-1)] = 255
    assert np.array_equal(pixels(path), expected)


def test_load_cmyk(tmp_path):
    path = write(tmp_path, "x.jpg", encoded(RGB.convert("CMYK"), "JPEG", quality=100, subsampling=0))
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    assert np.abs(pixels(path).astype(int) - picture()).max() <= 4


# Objects


def test_load_pillow_image_is_not_changed():
    image = RGB.copy()
    exif = image.getexif()
    exif[0x0112] = 6
    before = image.tobytes()
    result = load_image(image)
    assert result is not image
    assert result.size == (30, 40)
    assert (image.size, image.tobytes(), image.getexif()[0x0112]) == ((40, 30), before, 6)


def test_load_lazy_pillow_image(tmp_path):
    with Image.open(write(tmp_path, "x.png", encoded(RGB, "PNG"))) as image:
        assert np.array_equal(pixels(image), picture())
    truncated = encoded(NOISE, "PNG")[:-500]
    with Image.open(write(tmp_path, "y.png", truncated)) as image, pytest.raises(ImageError) as info:
        load_image(image)
    assert info.value.reason == "truncated"


@pytest.mark.parametrize("mode", ["I", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_load_modes_as_pillow_converts_them(mode):
    image = RGB.convert("L").convert(mode) if mode == "I" else RGB.convert(mode)
    assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_load_dark_files_of_16_bits_are_dark(tmp_path):
    grey = np.linspace(0, 255, 1200).astype(np.uint16).reshape(30, 40)
    path = write(tmp_path, "x.png", encoded(Image.fromarray(grey), "PNG"))
    with Image.open(path) as image:
        assert pixels(path).max() == pixels(image).max() == 0
    assert pixels(Image.new("I;16", (2, 2))).max() == 0


@pytest.mark.parametrize(("mode", "straight"), [("La", "LA"), ("RGBa", "RGBA"), ("PA", "RGBA")])
def test_load_other_modes_with_transparency(mode, straight):
    array = np.concatenate([picture(), np.full((30, 40, 1), 128, np.uint8)], axis=-1)
    image = Image.fromarray(array).convert(straight).convert(mode)
    colours = np.asarray(image.convert(straight).convert("RGBA"))[..., :3].astype(float)
    assert np.abs(pixels(image) - (colours * 128 + 255 * 127) / 255).max() <= 1


def test_load_array_and_tensor():
    array = picture()
    assert np.array_equal(pixels(array), array)
    assert np.array_equal(pixels(array[:, ::-1]), array[:, ::-1])
    assert np.array_equal(pixels(array[..., :1]), array[..., :1].repeat(3, 2))
    opaque = np.concatenate([array, np.full_like(array[..., :1], 255)], axis=-1)
    assert np.array_equal(pixels(opaque), array)
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 255
    assert np.array_equal(pixels(tensor), array)
    assert np.array_equal(pixels(tensor.double().requires_grad_()), array)
    assert np.array_equal(pixels(tensor[:1]), array[..., :1].repeat(3, 2))
    assert pixels(torch.full((3, 2, 2), 0.5, dtype=torch.bfloat16)).tolist() == [[[128] * 3] * 2] * 2


@pytest.mark.parametrize(
    ("source", "reason", "message"),
    [
        ("cat.png", "unsupported-type", "source is the str 'cat.png', and strings are text; use pathlib"),
        (b"\x89PNG", "unsupported-type", "source is a bytes, expected a pathlib.Path, a Pillow image"),
        (None, "unsupported-type", "source is a NoneType, expected"),
        (np.zeros((4, 4), np.uint8), "unsupported-type", r"array of shape \(4, 4\) and dtype uint8, expected"),
        (np.zeros((4, 4, 2), np.uint8), "unsupported-type", r"array of shape \(4, 4, 2\)"),
        (np.zeros((4, 4, 3), np.float32), "unsupported-type", "and dtype float32, expected"),
        (np.zeros((0, 4, 3), np.uint8), "empty", "has no pixels"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "unsupported-type", "and dtype torch.uint8, expected"),
        (torch.zeros(1, 3, 4, 4), "unsupported-type", r"tensor of shape \(1, 3, 4, 4\)"),
        (torch.zeros(4, 4, 3), "unsupported-type", r"tensor of shape \(4, 4, 3\)"),
        (torch.zeros(3, 4, 0), "empty", "has no pixels"),
        (torch.full((3, 2, 2), 1.5), "unsupported-type", "spans 1.5 to 1.5, expected 0 to 1"),
        (torch.full((3, 2, 2), -0.5), "unsupported-type", "spans -0.5 to -0.5, expected 0 to 1"),
        (torch.full((3, 2, 2), torch.nan), "unsupported-type", "spans nan to nan, expected 0 to 1"),
        (Image.new("F", (2, 2)), "unsupported-type", "has mode F, whose range is not known; give mode L or RGB"),
        (Image.new("I", (2, 2), -1), "unsupported-type", "has mode I and values from -1 to -1, .*; give mode L, where"),
        (Image.new("I", (2, 2), 70000), "unsupported-type", "values from 70000 to 70000, .*, or I;16, where 65535 is"),
        (RGB.convert("L").convert("I;16"), "unsupported-type", r"no value above \d+; give mode L, by convert\('L'\)"),
        (np.zeros((4, 4, 3), np.uint16), "unsupported-type", "and dtype uint16, expected .* uint8 array"),
        (np.zeros((4, 4, 3), bool), "unsupported-type", "and dtype bool, expected .* uint8 array"),
        (Image.new("RGB", (0, 2)), "empty", "has no pixels"),
    ],
)
def test_load_refuses_objects(source, reason, message):
    with pytest.raises(ImageError, match=message) as info:
        load_image(source)
    assert info.value.reason == reason
    assert isinstance(info.value, ValueError)
    assert isinstance(info.value.source, str)


# Bad files


def bad_contents():
    """Every kind of damage: name → (bytes, reason)."""
    whole = {kind: encoded(NOISE, kind) for kind in ("PNG", "JPEG", "WEBP")}
    webp = encoded(NOISE, "WEBP", lossless=True)
    pixel_data = whole["PNG"].index(b"IDAT") + 300
    stored = encoded(NOISE, "PNG", compress_level=0)
    lossy = encoded(NOISE, "WEBP")
    header_crc = len(SIGNATURE) + 8 + 13
    broken_zlib = png(40, 30, pixels=b"\0" * 40)
    contents = {
        "text.png": (b"this is a caption, not an image\n", "unsupported-format"),
        "empty.png": (b"", "empty"),
        "huge-complete.png": (png(60000, 60000, pixels=b"\0" * 10), "too-large"),
        "huge-header.png": (SIGNATURE + chunk(b"IHDR", b"\0\0\xea\x60\0\0\xea\x60\x08\x02\0\0\0"), "too-large"),
        "huge.jpg": (jpeg_header(60000, 60000), "too-large"),
        "huge.webp": (webp_header(16384, 16384), "too-large"),
        "bitmap.png": (encoded(RGB, "BMP"), "unsupported-format"),
        "gif.png": (encoded(RGB, "GIF"), "unsupported-format"),
        "tiff.png": (encoded(RGB, "TIFF"), "unsupported-format"),
        "fits.png": (b"SIMPLE  =                    T" + b" " * 2850, "unsupported-format"),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported-format"),
        "audio.webp": (b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 28, "unsupported-format"),
        "corrupt-checksum.png": (flipped(whole["PNG"], pixel_data), "corrupt"),
        # Without compression every pixel stream decodes; only the checksum tells.
        "corrupt-stored.png": (flipped(stored, pixel_data), "corrupt"),
        "corrupt-header-checksum.png": (flipped(whole["PNG"], header_crc), "corrupt"),
        "corrupt-first-chunk.png": (whole["PNG"].replace(b"IHDR", b"JHDR"), "corrupt"),
        "short-chunk.png": (png(40, 30, pixels=b"\0", extra=chunk(b"pHYs", b"\0")), "corrupt"),
        "short-pixels.png": (broken_zlib, "truncated"),
        "no-pixels.png": (png(40, 30), "corrupt"),
        "zero-size.png": (png(0, 30, pixels=b"\0"), "corrupt"),
        "no-quantisation.jpg": (whole["JPEG"].replace(b"\xff\xdb", b"\xff\xee"), "corrupt"),
        "corrupt-segment.jpg": (b"\xff\xd8\xff\xe0\x00\x00" + whole["JPEG"][6:], "corrupt"),
        "12-bits.jpg": (jpeg_header(40, 30).replace(b"\x00\x11\x08", b"\x00\x11\x0c"), "unsupported-format"),
        "2-channels.jpg": (jpeg_header(40, 30)[:-10] + b"\x02" + b"\0" * 9, "unsupported-format"),
        "no-frame.jpg": (b"\xff\xd8\xff\xd9", "corrupt"),
        "corrupt.webp": (webp[:30] + bytes(len(webp) - 30), "corrupt"),
        "corrupt-kind.webp": (webp.replace(b"VP8L", b"VP8?"), "corrupt"),
        "nothing-on-canvas.webp": (webp_header(20, 20), "corrupt"),
    }
    for kind, data in whole.items():
        for name, kept in (("start", 2), ("header", 18), ("half", len(data) // 2), ("end", len(data) - 30)):
            contents[f"truncated-{name}.{kind.lower()}"] = (data[:kept], "truncated")
    contents["truncated-in-header-chunk.png"] = (whole["PNG"][:26], "truncated")
    contents["truncated-between-chunks.png"] = (whole["PNG"][:-12], "truncated")
    # A container that says it is as short as it is.
    contents["truncated-consistently.webp"] = (lossy[:4] + b"\x14\0\0\0" + lossy[8:28], "truncated")
    contents["truncated.lossless.webp"] = (webp[: len(webp) // 2], "truncated")
    return contents


BAD = bad_contents()


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    files = {name: (write(folder, name, data), reason) for name, (data, reason) in BAD.items()}
    files["missing.png"] = (folder / "missing.png", "missing")
    files["below-a-file.png"] = (files["empty.png"][0] / "x.png", "missing")
    (folder / "folder.png").mkdir()
    files["folder.png"] = (folder / "folder.png", "is-directory")
    os.mkfifo(folder / "pipe.png")
    files["pipe.png"] = (folder / "pipe.png", "not-a-file")
    files["nul"] = (folder / "a\0b", "unreadable")
    return files


NOT_DATA = ["missing.png", "below-a-file.png", "folder.png", "pipe.png", "nul"]


@pytest.mark.parametrize("name", [*BAD, *NOT_DATA])
def test_load_refuses_bad_files(name, bad):
    path, reason = bad[name]
    with pytest.raises(ImageError) as info:
        load_image(path)
    assert info.value.reason == reason
    assert info.value.source == path
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True})],
)
def test_load_refuses_every_beginning_of_a_file(kind, options, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 10, 3), dtype=np.uint8))
    data = encoded(small, kind, exif=exif, **options)
    # The last four bytes of a PNG are the checksum of an empty chunk.
    for length in range(1, len(data) - (4 if kind == "PNG" else 0)):
        with pytest.raises(ImageError) as info:
            load_image(write(tmp_path, "x", data[:length]))
        assert (length, info.value.reason) == (length, "truncated")


def test_load_permission(tmp_path, monkeypatch):
    path = write(tmp_path, "x.png", encoded(RGB, "PNG"))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # The tests may run as root, whom no mode bits stop.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match="cannot be read: Permission denied") as info:
        load_image(path)
    assert info.value.reason == "unreadable"


def test_load_size_limit(tmp_path, monkeypatch):
    assert MAX_PIXELS == 89478485
    side = 9460
    assert side**2 > MAX_PIXELS
    with pytest.raises(ImageError, match=f"has {side} × {side} pixels, the limit is {MAX_PIXELS} in all") as info:
        load_image(write(tmp_path, "a.png", png(side, side)))
    assert info.value.reason == "too-large"
    # A stricter limit of the application holds here too.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="the limit is 1000 in all"):
        load_image(write(tmp_path, "b.png", encoded(RGB, "PNG")))
    with pytest.raises(ImageError, match="the limit is 1000 in all"):
        load_image(RGB)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=f"the limit is {MAX_PIXELS} in all"):
        load_image(tmp_path / "a.png")


def test_load_byte_limit(tmp_path):
    path = write(tmp_path, "sparse.png", encoded(RGB, "PNG"))
    os.truncate(path, 2**31)
    with pytest.raises(ImageError, match=f"has {2**31} bytes, the limit is {2**30}") as info:
        load_image(path)
    assert info.value.reason == "too-large"


def test_load_warns_of_nothing_and_changes_nothing_global(bad, tmp_path):
    good = write(tmp_path, "x.png", encoded(RGB, "PNG"))
    state = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path, _ in bad.values():
            with pytest.raises(ImageError):
                load_image(path)
        load_image(good)
    # An unclosed file would be a ResourceWarning here.
    assert [str(w.message) for w in caught] == []
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == state


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_load_leaves_no_file_open(bad, tmp_path):
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(2)]
    animated = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    paths = [write(tmp_path, kind, encoded(RGB, kind)) for kind in ("PNG", "JPEG", "WEBP")]
    paths += [write(tmp_path, "animated", animated), *(path for path, _ in bad.values())]
    results = []

    def targets():
        links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return {os.readlink(link) for link in links if os.path.exists(link)}

    for path in paths:
        try:
            results.append(load_image(path))
        except ImageError as error:
            results.append(error)
        assert str(path) not in targets()


def test_load_in_threads(bad, tmp_path):
    paths = [write(tmp_path, f"{i}.png", encoded(Image.fromarray(picture(seed=i)), "PNG")) for i in range(8)]
    paths += [path for path, _ in bad.values()]
    barrier = threading.Barrier(4)

    def load_all(_):
        barrier.wait()
        out = []
        for path in paths:
            try:
                out.append(load_image(path).tobytes())
            except ImageError as error:
                out.append(error.reason)
        return out

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(load_all, range(4))
    assert first[:8] == [picture(seed=i).tobytes() for i in range(8)]
    assert all(other == first for other in others)


def test_image_error_travels_between_processes(tmp_path):
    with pytest.raises(ImageError) as info:
        load_image(tmp_path / "missing.png")
    error = info.value
    context = multiprocessing.reduction.ForkingPickler.dumps(error)
    again = multiprocessing.reduction.ForkingPickler.loads(context)
    assert (again.source, again.reason, str(again)) == (error.source, error.reason, str(error))
    assert type(again) is ImageError
