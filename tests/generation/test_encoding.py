"""Pictures to bytes, and what an image says of itself."""

import io
import json
import threading
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from dsd_fast.generation.encoding import QUALITY, Encoder, described
from dsd_fast.generation.marks import NAMESPACE, packet
from dsd_fast.jobs import Timeline
from tests.generation.pictures import MODEL, SIZE, picture

ROW = {"id": "ab", "prompt": "a cat", "seed": 2**64 - 1, "cls": 3}
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"


def encoder(format="png", quality=None, timeline=None, **options) -> Encoder:
    options = {"about": {"model": MODEL}, "threads": 1, **options}
    return Encoder(format, quality, timeline=timeline or Timeline(), **options)


def encode(format="png", pixels=None, row=ROW, **options):
    with encoder(format, **options) as pool:
        return pool.submit(picture(3) if pixels is None else pixels, row).result()


def told(content: bytes) -> dict[str, str]:
    """The properties of an XMP packet."""
    root = ElementTree.fromstring(content.decode().removeprefix("\ufeff"))
    return {each.tag: each.text for each in root.iter() if each.text}


@pytest.mark.parametrize("format", QUALITY)
def test_each_format_keeps_the_picture_and_says_what_made_it(format):
    sample = encode(format)
    image = Image.open(io.BytesIO(sample.image))
    assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[format]
    assert image.size == SIZE[::-1]
    error = np.abs(np.asarray(image.convert("RGB")).astype(int) - picture(3))
    # WebP is lossy in 4:2:0; a smooth picture hides that.
    assert error.max() <= {"png": 0, "jpg": 6, "webp": 12}[format]
    properties = told(image.info["xmp"])
    assert properties == {
        f"{IPTC}DigitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
        f"{IPTC}AISystemUsed": "a <model> & its \ufffdname",
        f"{{{NAMESPACE}}}Seed": str(2**64 - 1),
    }
    plain = encode(format, mark=False)
    assert "xmp" not in Image.open(io.BytesIO(plain.image)).info
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(plain.image))), np.asarray(image))


def test_jpeg_keeps_the_colours_of_single_columns():
    red, blue = (255, 0, 0), (0, 0, 255)
    stripes = np.array([[red, blue] * 8] * 16, np.uint8)
    error = np.abs(np.asarray(Image.open(io.BytesIO(encode("jpg", stripes).image))).astype(int) - stripes)
    # Halved chroma mixes them into one purple: an error of 127.
    assert error.max() < 40


def test_quality():
    sizes = [len(encode("jpg", quality=quality).image) for quality in (50, None, 100)]
    assert sizes == sorted(set(sizes))
    for format, quality, expected in (
        ("png", 90, "quality: got 90 for png, which loses nothing; expected none"),
        ("jpg", 0, "quality: got 0, expected an integer from 1 to 100"),
        ("webp", True, "quality: got True"),
        ("gif", None, "format: got 'gif', expected one of png, jpg, webp"),
    ):
        with pytest.raises(ValueError, match=expected):
            encoder(format, quality)
    with pytest.raises(ValueError, match="about: got nothing, expected the model's name as model"):
        encoder(about={})


def test_what_xml_forbids_becomes_a_replacement():
    every = "".join(
        map(chr, (*range(0x20), 0x7F, 0x85, 0xD7FF, 0xD800, 0xDFFF, 0xE000, 0xFFFD, 0xFFFE, 0xFFFF, 0x10FFFF))
    )
    name = told(packet(every, None))[f"{IPTC}AISystemUsed"]
    # A parser makes "\n" of "\r"; what XML allows stays.
    kept = [
        each
        if each in "\t\n" or (each >= " " and not "\ud800" <= each <= "\udfff" and each not in "\ufffe\uffff")
        else "\ufffd"
        for each in every
    ]
    assert name == "".join("\n" if each == "\r" else keep for each, keep in zip(every, kept, strict=True))


def test_the_text_and_the_json_of_any_prompt():
    sample = encode(row={"prompt": "a\ud800b\x00\n", "seed": 1, "score": float("nan"), "cls": None, "clip": b"x"})
    assert (sample.text, sample.cls) == ("a\\ud800b\x00\n", b"-1")
    assert json.loads(sample.json) == {"model": MODEL, "prompt": sample.text, "seed": "1"}
    assert encode(row={"prompt": ""}).text == ""
    assert described({"seed": None, "image": "a.png", "steps": 0}) == {"source_image": "a.png", "steps": 0}


def test_pixels_of_another_kind_are_refused():
    with encoder() as pool:
        for pixels in (np.zeros((2, 2, 3), np.float32), np.zeros((2, 2), np.uint8), np.zeros((0, 2, 3), np.uint8)):
            with pytest.raises(ValueError, match=r"pixels: got .*, expected uint8 \(H, W, 3\)"):
                pool.submit(pixels, ROW)


def test_raw_pictures_that_wait_are_few(monkeypatch):
    go, begun = threading.Event(), threading.Event()
    original = Encoder._sample

    def slow(self, *arguments):
        begun.set()
        assert go.wait(10)
        return original(self, *arguments)

    monkeypatch.setattr(Encoder, "_sample", slow)
    timeline = Timeline()
    with encoder(threads=2, timeline=timeline) as pool:
        samples = [pool.submit(picture(number), ROW) for number in range(4)]
        more = threading.Thread(target=lambda: samples.append(pool.submit(picture(4), ROW)))
        more.start()
        more.join(0.1)
        assert more.is_alive()
        go.set()
        more.join(10)
        assert [sample.result().image for sample in samples] == [
            encode(pixels=picture(each)).image for each in range(5)
        ]
    assert {name for name, _, _ in timeline.spans} <= {"encode-0", "encode-1"}
    assert timeline.spans


def test_an_error_of_one_picture_comes_with_it_and_makes_room():
    with encoder() as pool:
        for _ in range(5):
            with pytest.raises(KeyError, match="prompt"):
                pool.submit(picture(0), {}).result()
        assert pool.submit(picture(0), ROW).result().cls == b"3"


def test_an_early_end_still_gives_what_was_submitted():
    samples = []

    def stopped():
        with encoder() as pool:
            samples.extend(pool.submit(picture(0), ROW) for _ in range(2))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stopped()
    assert [sample.result().cls for sample in samples] == [b"3", b"3"]
