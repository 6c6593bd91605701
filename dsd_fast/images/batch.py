"""RGB images to model input, one by one, as a batch, or streamed by threads in bounded memory."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsd_fast.images.errors import ImageError
from dsd_fast.images.load import ImageSource, load_image, take

_MAX_DEFAULT_WORKERS = 8
Item = TypeVar("Item")
Result = TypeVar("Result")

# Pixels of decoded images waiting for their turn.
_PIXEL_BYTES = 64 << 20


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Pixels as the VAE takes them: Pillow's bicubic resize, aspect ratio not kept, then x / 255 · 2 − 1.

    The same arithmetic as the official DSD code (eric-ai-lab/DSD), so equal files give equal tensors.

    Args:
        image: a Pillow image; modes other than RGB are converted as in `load_image`.
        size: (height, width) in pixels.

    Returns:
        (3, height, width) float32 in [−1, 1], contiguous.

    Raises:
        ValueError: `size` is not two positive integers.
        ImageError: the image cannot be converted to RGB.
    """
    height, width = _check_size(size)
    rgb = image if image.mode == "RGB" else load_image(image)
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous().to(torch.float32)
    return pixels.div_(255).mul_(2).sub_(1)


def to_picture(pixels: Tensor) -> Image.Image:
    """The 8-bit RGB picture of (3, height, width) pixels in [−1, 1]: what `to_tensor` made them from."""
    values = pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().cpu().numpy())


def load_batch(sources: Iterable[ImageSource], size: tuple[int, int], *, workers: int | None = None) -> Tensor:
    """All images at once.

    Args:
        sources: what `load_image` takes.
        size: (height, width) in pixels.
        workers: decoding threads; None: one per core, 8 at most.

    Returns:
        (N, 3, height, width) float32 in [−1, 1].

    Raises:
        ImageError: of the first image, in order, that cannot be used.
        ValueError: `size` or `workers` is not what is expected.
    """
    tensors = []
    for _, result in decode(sources, size, workers=workers):
        if isinstance(result, ImageError):
            raise result
        tensors.append(result)
    return torch.stack(tensors) if tensors else torch.empty(0, 3, *size, dtype=torch.float32, device="cpu")


def decode(
    sources: Iterable[ImageSource],
    size: tuple[int, int],
    *,
    workers: int | None = None,
    read_ahead: int | None = None,
) -> Iterator[tuple[int, Tensor | ImageError]]:
    """Streams any number of images, decoded by threads ahead of the caller.

    Args:
        sources: what `load_image` takes; consumed as it goes, no further ahead than `read_ahead`.
        size: (height, width) in pixels.
        workers: decoding threads; None: one per core, 8 at most.
        read_ahead: images decoded or being decoded beyond the one the caller holds; None: twice `workers`.

    Yields:
        (index, tensor) in the order of `sources`, the tensor as from `to_tensor`; or (index, ImageError) for an image
        that cannot be used.

    Raises:
        ValueError: `size`, `workers` or `read_ahead` is not what is expected; raised at the call.
    """
    size = _check_size(size)
    if workers is None:
        workers = min(os.cpu_count() or 1, _MAX_DEFAULT_WORKERS)
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    if read_ahead is None:
        read_ahead = 2 * workers
    if read_ahead < 1:
        raise ValueError(f"read_ahead is {read_ahead}, expected at least 1")
    load = partial(_load, size=size)
    images = ahead(load, sources, workers=workers, read_ahead=read_ahead, name="dsd-decode")
    # A generator too, which a caller can close.
    return (numbered for numbered in enumerate(images))


def decode_chunks(
    sources: Iterable[ImageSource], size: tuple[int, int], chunk: int
) -> Iterator[tuple[list[int], list[Tensor], dict[int, ImageError]]]:
    """:func:`decode` in chunks of at most ``chunk`` images.

    Fewer where their float32 pixels would take more than 64 MiB.

    Yields:
        (numbers, tensors, errors): positions in ``sources`` of the images that can be used, their tensors in the same
        order, and position → error of the others.

    Raises:
        ValueError: one image where a sequence of them is expected, or an argument that :func:`decode` refuses.
    """
    check_sources(sources)
    height, width = _check_size(size)
    return _chunks(decode(sources, size), max(1, min(chunk, _PIXEL_BYTES // (12 * height * width))))


def check_sources(sources: object) -> None:
    """Refuses one image where a sequence of them is expected.

    Raises:
        ValueError: it is one.
    """
    if isinstance(sources, (str, bytes, os.PathLike, Image.Image, np.ndarray, Tensor)):
        raise ValueError(f"images: got one {type(sources).__name__}, expected a sequence of images")


def _chunks(
    images: Iterator[tuple[int, Tensor | ImageError]], chunk: int
) -> Iterator[tuple[list[int], list[Tensor], dict[int, ImageError]]]:
    while some := dict(itertools.islice(images, chunk)):
        errors = {number: image for number, image in some.items() if isinstance(image, ImageError)}
        pixels = {number: image for number, image in some.items() if isinstance(image, Tensor)}
        yield list(pixels), list(pixels.values()), errors
        # Not to be held beside the next ones.
        del some, pixels


def drawn(items: Iterable[Any], taken: Callable[[Any], Any] = take) -> Iterable[Any]:
    """The items of a caller, the images of each out of the caller's reach before the next one is asked for.

    A generator may fill one buffer for all of its items, close an image or turn it to its next frame. A list or a tuple
    holds all of them at once, and nothing of it is copied.

    Args:
        taken: makes of an item one that the caller does not change, :func:`~dsd_fast.images.load.take` of an image.
    """
    return items if type(items) in (list, tuple) else map(taken, items)


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, read_ahead: int, name: str
) -> Iterator[Result]:
    """Yield what a function gives for each item, in the order of the items, by threads ahead of the caller.

    Args:
        items: consumed as it goes, no further ahead than ``read_ahead``; images among them as :func:`drawn` has them.
        name: of the threads.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    source = iter(drawn(items))
    pending: deque[Future[Result]] = deque()
    try:
        while True:
            pending += (pool.submit(function, item) for item in itertools.islice(source, read_ahead - len(pending)))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        # Also reached when the caller stops early: nothing keeps working behind its back.
        pool.shutdown(wait=True, cancel_futures=True)


def _load(source: ImageSource, size: tuple[int, int]) -> Tensor | ImageError:
    try:
        return to_tensor(load_image(source), size)
    except ImageError as error:
        return error


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    values = tuple(size)
    if len(values) != 2 or not all(isinstance(v, int | np.integer) and v > 0 for v in values):
        raise ValueError(f"size is {size!r}, expected (height, width), two positive integers")
    return int(values[0]), int(values[1])
