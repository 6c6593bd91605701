"""The order of chunks on their way to host memory."""

import torch

from dsd_fast.features import host
from dsd_fast.features.extraction import Extracted
from dsd_fast.images import ImageError
from dsd_fast.kernels.common.transfer import Download


class Beside(Download):
    """A copy that goes on by itself where there is anything to copy, as from a GPU."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.beside = bool(len(tensors[""]))

    def done(self):
        self.beside = False
        return super().done()


def test_chunks_keep_their_order_and_say_what_is_finite(monkeypatch):
    monkeypatch.setattr(host, "Download", Beside)
    values = [
        torch.zeros(2, 1, 3, 2, 2),
        torch.ones(1, 1, 3, 2, 2),
        torch.empty(0, 1, 3, 2, 2),
        torch.ones(1, 1, 3, 2, 2),
    ]
    values[0][1, 0, 2, 0, 1], values[3][0, 0, 0, 0, 0] = float("nan"), float("inf")
    error = ImageError("a.png", "missing", "a.png does not exist")
    numbers = [[0, 1], [2], [], [4]]
    chunks = [
        Extracted(own, [{"a": value}], {} if own else {3: error}) for own, value in zip(numbers, values, strict=True)
    ]
    found = list(host.on_host(iter(chunks)))
    assert [part.numbers for part, _ in found] == numbers
    assert [finite for _, finite in found] == [[True, False], [True], [], [False]]
    assert found[0][0].features[0]["a"].shape == values[0].shape
