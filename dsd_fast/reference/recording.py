"""Cross-attention layers that also write down what they compute."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor


@contextmanager
def recording(
    layers: Sequence[Attention], make_processor: Callable[[Callable[[Tensor], None]], Any]
) -> Iterator[list[Tensor]]:
    """Inside, the layers have processors of their own, and what these record is appended to the list, layer by layer.

    Args:
        layers: that record; they get their own processors back, after an exception too.
        make_processor: makes a layer's processor, given what it calls with each tensor that it records.

    Raises:
        ValueError: a layer's own processor computes something else than plain attention.
    """
    recorded: list[Tensor] = []
    originals = [layer.processor for layer in layers]
    for original in originals:
        if type(original) not in (AttnProcessor, AttnProcessor2_0):
            raise ValueError(f"pipe: its attention processor {type(original).__name__} computes something else")
    try:
        for layer in layers:
            layer.set_processor(make_processor(recorded.append))
        yield recorded
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.set_processor(original)
