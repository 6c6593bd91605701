"""Attention layers that also write down what they compute."""

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


class MapProcessor:
    """Attention as diffusers' `AttnProcessor`, which records its probabilities, (B, H, L, K)."""

    def __init__(self, record: Callable[[Tensor], None]) -> None:
        self.record = record

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(context))
        value = attn.head_to_batch_dim(attn.to_v(context))
        output: Tensor = attn.batch_to_head_dim(self.probabilities(attn, query, key).to(value.dtype) @ value)
        for layer in attn.to_out:
            output = layer(output)
        return output

    def probabilities(self, attn: Attention, query: Tensor, key: Tensor) -> Tensor:
        """(B · H, L, K) of queries (B · H, L, D) and keys (B · H, K, D)."""
        probabilities: Tensor = attn.get_attention_scores(query, key)
        self.record(probabilities.detach().view(-1, attn.heads, *probabilities.shape[1:]))
        return probabilities


def picture(value: Tensor, size: Sequence[int]) -> Tensor:
    """Lay (B, L, C) out as (B, C, h, w), contiguous; (h, w) is `size` halved, rounded up, until it has L positions."""
    height, width = size
    while height * width > value.shape[1]:
        height, width = -(-height // 2), -(-width // 2)
    return value.transpose(1, 2).reshape(len(value), -1, height, width)
