import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dsd_fast.images import ImageError, decode, load_batch, load_image, to_tensor
from tests.images.files import encoded, picture, refilled, write

SIZE = (24, 32)


@pytest.fixture
def paths(tmp_path):
    return [write(tmp_path, f"{i}.png", encoded(Image.fromarray(picture(seed=i)), "PNG")) for i in range(12)]


def test_to_tensor_is_the_official_arithmetic():
    image = Image.fromarray(picture())
    result = to_tensor(image, SIZE)
    # dsd: image.resize((512, 512)), np.array / 255, 2 x - 1; Pillow's resize is bicubic unless told otherwise.
    resized = np.array(image.resize((SIZE[1], SIZE[0]))).astype(np.float32) / 255.0
    expected = 2.0 * torch.from_numpy(resized.transpose(2, 0, 1)) - 1.0
    assert torch.equal(result, expected)
    assert result.dtype == torch.float32
    assert result.shape == (3, *SIZE)
    assert result.is_contiguous()
    bilinear = np.asarray(image.resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR))
    assert not np.array_equal(bilinear, np.round(resized * 255).astype(np.uint8))


def test_to_tensor_without_resizing():
    array = np.array([[[0, 128, 255]]], np.uint8)
    result = to_tensor(Image.fromarray(array), (1, 1)).flatten()
    assert result[0] == -1
    assert result[2] == 1
    assert result[1] == pytest.approx(2 * 128 / 255 - 1, abs=1e-7)


def test_to_tensor_converts_modes():
    alpha = Image.fromarray(np.zeros((2, 2, 4), np.uint8))
    assert torch.equal(to_tensor(alpha, (2, 2)), torch.ones(3, 2, 2))


@pytest.mark.parametrize("size", [(0, 4), (4,), (4, 4, 4), (4.0, 4), (-1, 4), ("4", 4)])
def test_size_is_checked(size):
    message = r"size is .*, expected \(height, width\), two positive integers"
    with pytest.raises(ValueError, match=message):
        to_tensor(Image.fromarray(picture()), size)
    with pytest.raises(ValueError, match=message):
        decode([], size)


def test_load_batch(paths):
    sources = [paths[0], Image.fromarray(picture(seed=1)), picture(seed=2)]
    batch = load_batch(sources, SIZE)
    assert batch.shape == (3, 3, *SIZE)
    assert torch.equal(batch, torch.stack([to_tensor(load_image(path), SIZE) for path in paths[:3]]))
    assert load_batch([], SIZE).shape == (0, 3, *SIZE)


@pytest.mark.parametrize("kind", ["array", "tensor", "pillow", "frames", "files that are closed"])
def test_pixels_are_taken_before_the_next_image_is_asked_for(kind):
    arrays = [picture(seed=seed) for seed in range(6)]
    assert torch.equal(load_batch(refilled(kind, arrays), SIZE), load_batch(arrays, SIZE))


def test_a_sequence_of_the_callers_own_may_have_one_buffer():
    arrays, buffer = [picture(seed=seed) for seed in range(6)], picture()

    class Video:
        def __getitem__(self, number):
            buffer[:] = arrays[number]
            return buffer

    assert torch.equal(load_batch(Video(), SIZE), load_batch(arrays, SIZE))


def test_an_image_that_cannot_be_taken_keeps_its_place():
    broken = Image.open(io.BytesIO(encoded(Image.fromarray(picture()), "PNG")[:-40]))
    results = [result for _, result in decode(iter([picture(), broken, picture(seed=1)]), SIZE)]
    assert [isinstance(result, ImageError) for result in results] == [False, True, False]
    assert results[1].reason == "truncated"


def test_load_batch_raises_the_first_error(paths, tmp_path):
    with pytest.raises(ImageError, match=r"one\.png does not exist"):
        load_batch([paths[0], tmp_path / "one.png", tmp_path / "two.png"], SIZE)


@pytest.mark.parametrize("workers", [1, 3])
def test_decode_in_order_with_errors_in_place(workers, paths, tmp_path):
    sources = [*paths[:5], tmp_path / "missing.png", *paths[5:], write(tmp_path, "empty.png", b"")]
    results = list(decode(sources, SIZE, workers=workers))
    assert [index for index, _ in results] == list(range(len(sources)))
    for (_, result), source in zip(results, sources, strict=True):
        if source in paths:
            assert torch.equal(result, to_tensor(load_image(source), SIZE))
        else:
            assert isinstance(result, ImageError)
            assert result.source == source
    assert [results[5][1].reason, results[-1][1].reason] == ["missing", "empty"]


def test_decode_keeps_order_when_threads_finish_out_of_order(monkeypatch):
    # The first image is held back until the second is done.
    second_done = threading.Event()

    def slow_load(source):
        if source[0, 0, 0] == 0:
            assert second_done.wait(10)
        else:
            second_done.set()
        return Image.fromarray(source)

    monkeypatch.setattr("dsd_fast.images.batch.load_image", slow_load)
    sources = [np.full((2, 2, 3), value, np.uint8) for value in (0, 255)]
    results = list(decode(sources, (2, 2), workers=2))
    assert [result.mean().item() for _, result in results] == [-1, 1]


def test_decode_reads_a_bounded_number_ahead(paths):
    taken = []

    def endless():
        while True:
            taken.append(None)
            yield paths[len(taken) % len(paths)]

    stream = decode(endless(), SIZE, workers=2, read_ahead=3)
    assert taken == []
    for consumed in range(1, 20):
        next(stream)
        assert len(taken) <= consumed + 3
    stream.close()


def test_decode_stops_its_threads(paths):
    before = threading.active_count()
    stream = decode(iter(paths), SIZE, workers=2)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


def test_decode_passes_other_errors_on(paths):
    def broken():
        yield paths[0]
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        list(decode(broken(), SIZE))


def test_decode_refuses():
    with pytest.raises(ValueError, match="workers is 0, expected at least 1"):
        decode([], SIZE, workers=0)
    with pytest.raises(ValueError, match="read_ahead is 0, expected at least 1"):
        decode([], SIZE, read_ahead=0)
