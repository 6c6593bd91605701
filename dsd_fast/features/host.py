"""Features on their way to host memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dsd_fast.features.extraction import Extracted


def on_host(chunks: Iterator[Extracted]) -> Iterator[tuple[Extracted, list[bool]]]:
    """Chunks of one technique with their features in host memory, and whether all values of each image are finite.

    From a GPU a chunk is copied beside the computation of the next one.
    """
    waiting: _Copy | None = None
    for chunk in chunks:
        copied = _Copy(chunk)
        if not copied.beside:
            # Chunks keep their order: one without a usable image has nothing on the GPU.
            if waiting is not None:
                yield waiting.done()
                waiting = None
            yield copied.done()
            continue
        if waiting is not None:
            yield waiting.done()
        waiting = copied
    if waiting is not None:
        yield waiting.done()


class _Copy:
    """A chunk whose copy has begun; ``beside`` where it goes on by itself.

    It holds what it copies until it is done.
    """

    def __init__(self, chunk: Extracted) -> None:
        self._chunk, features = chunk, chunk.features[0]
        self._read = tensors = {**features, "": _finite(features, len(chunk.numbers))}
        device = tensors[""].device
        self.beside = device.type == "cuda"
        if not self.beside:
            self._found = tensors
            return
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._found = {}
            for name, value in tensors.items():
                pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                self._found[name] = pinned.copy_(value, non_blocking=True)
            self._event = stream.record_event()

    def done(self) -> tuple[Extracted, list[bool]]:
        """The chunk, once it is here."""
        if self.beside:
            self._event.synchronize()
        finite: list[bool] = self._found.pop("").tolist()
        return replace(self._chunk, features=[self._found]), finite


def _finite(features: dict[str, Tensor], count: int) -> Tensor:
    """(n,) whether all values of each image are finite numbers."""
    found = []
    for value in features.values():
        if not count:
            return torch.ones(0, dtype=torch.bool, device="cpu")
        # NaN wins in both, and nothing of the features' size is made.
        low, high = torch.aminmax(value.flatten(1), dim=1)
        found.append(low.isfinite() & high.isfinite())
    return torch.stack(found).all(0)
