"""What a cut costs: FLOPs by step, and memory by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch

from dsd_fast.kernels.common import backend
from dsd_fast.kernels.common.attention import CHUNK_COPIES, chunk_elements
from dsd_fast.unet.cut import Cut
from dsd_fast.unet.flops import linear_flops
from dsd_fast.unet.network import Network
from dsd_fast.unet.step import Size, Step, Want, area

# Those that hold logits where they run in plain torch.
OPERATORS = ("cross_attention_score", "token_maps")

# What was asked last of each cut: samplers ask the same at every step.
_Asked = tuple[Sequence[Size], int, int, torch.dtype]
_Rows = tuple[int, set[tuple[int, int]]]
_last: WeakKeyDictionary[Cut, tuple[_Asked, _Rows]] = WeakKeyDictionary()


def flops_by_step(cut: Cut, latents: int, texts: int, rows: int, sizes: Sequence[Size], tokens: int) -> dict[str, int]:
    """FLOPs of the texts' keys and values (``text``), of the time embedding (``time``) and of each step by name."""
    network = cut.network
    keys = [network.attention(name).to_k for name in cut.key_layers]
    values = [network.attention(name).to_v for name in cut.value_layers]
    table = {
        "text": sum(linear_flops(layer, texts * tokens) for layer in (*keys, *values)),
        "time": network.time_flops({step.name for step in cut.steps}, latents, rows),
    }
    for index, (step, want) in enumerate(zip(cut.steps, cut.wants, strict=True)):
        count = latents if index < cut.boundary else rows
        table[step.name] = count * _step_flops(network, step, want, sizes[step.level], tokens)
    return table


def _step_flops(network: Network, step: Step, want: Want, size: Size, tokens: int) -> int:
    if want.maps and step.map_flops is not None:
        # The attention itself is left out where nothing reads its output.
        return step.map_flops(size, tokens) + (0 if want.last else step.flops(size, tokens))
    if not step.score:
        return step.flops(size, tokens)
    # q kᵀ once more for the maps; of the attention itself, q kᵀ alone where nothing reads its output.
    width: int = network.attention(step.name).inner_dim
    product = 2 * area(size) * tokens * width
    attention = (product if want.score else 0) if want.last else step.flops(size, tokens)
    return attention + (product if want.maps else 0)


class Memory:
    """The bytes alive at the peak of runs of a cut, by their rows.

    Args:
        sizes: image size at each level.
        tokens: T.
        maps: how many tokens' maps are asked for.
        extra: bytes that come with each row besides.

    Attributes:
        largest: no tensor has more elements of one row.
    """

    def __init__(self, cut: Cut, sizes: Sequence[Size], tokens: int, maps: int = 0, extra: int = 0) -> None:
        self._most = _chunk_bytes(cut.network)
        self.largest, alive = _of_a_row(cut, sizes, tokens, maps)
        self._alive = {(held + extra, chunk) for held, chunk in alive}

    def of(self, rows: int) -> int:
        """Give the bytes of a run of ``rows`` rows."""
        return max(rows * alive + min(self._most, rows * chunk) for alive, chunk in self._alive)

    def rows_within(self, budget: int) -> int:
        """Give the most rows whose bytes fit ``budget``, 0 if none do."""
        return max(
            0, min(max(budget // (alive + chunk), (budget - self._most) // alive) for alive, chunk in self._alive)
        )


def _of_a_row(cut: Cut, sizes: Sequence[Size], tokens: int, maps: int) -> _Rows:
    """The elements of a run's largest tensor, and what :func:`_alive` gives."""
    asked, known = (sizes, tokens, maps, cut.network.dtype), _last.get(cut)
    if known is None or known[0] != asked:
        largest = max(_elements(step, want, sizes[step.level], tokens, maps) for step, want in _taken(cut))
        known = _last[cut] = asked, (largest, _alive(cut, sizes, tokens, maps))
    return known[1]


def _taken(cut: Cut) -> Iterator[tuple[Step, Want]]:
    return zip(cut.steps, cut.wants, strict=True)


def _elements(step: Step, want: Want, size: Size, tokens: int, maps: int) -> int:
    """Elements of one row that no tensor of a step exceeds: all that are alive at once, or what it gives."""
    taken = math.prod(step.shape(size, tokens)) if want.feature and step.shape is not None else 1
    drawn = step.keys(size, maps) * area(size) if want.maps else 1
    return max(step.elements(size, tokens), taken, drawn)


def _chunk_bytes(network: Network) -> int:
    """Bytes of the most logits that an attention operator holds at once: plain torch works them through in chunks."""
    available = backend.available(network.device.type, network.dtype)
    if all(backend.choice(name, available) != "reference" for name in OPERATORS):
        return 0
    real = 8 if network.dtype == torch.float64 else 4
    return CHUNK_COPIES * real * chunk_elements(network.device)


def _alive(cut: Cut, sizes: Sequence[Size], tokens: int, maps: int) -> set[tuple[int, int]]:
    """At each step, the bytes of one row that are alive (outputs and skip connections so far included), and the bytes
    of its logits if the step has them all at once."""
    network, itemsize = cut.network, cut.network.dtype.itemsize
    real = max(4, itemsize)
    # The row's latents, time embedding, and what it enters the network with live as long as the run.
    held = itemsize * (network.latent_channels * area(sizes[0]) + 4 * network.time_width)
    if cut.entry is not None:
        held += math.prod(cut.kept_shape(*sizes[0])) * itemsize
    kept = pushed = 0
    stack: list[int] = []
    result = set()
    for step, want in _taken(cut):
        size = sizes[step.level]
        if step.pops:
            held -= stack.pop()
        # Whole attention maps are made in float32, whatever the network is.
        alive = step.elements(size, tokens) * (real if step.optional else itemsize)
        logits = step.score or want.maps
        chunk = CHUNK_COPIES * real * step.heads * area(size) * step.keys(size, tokens) if logits else 0
        result.add((held + kept + alive, chunk))
        if step.pushes:
            if pushed in cut.kept_skips:
                stack.append(step.pushes * area(size) * itemsize)
                held += stack[-1]
            pushed += 1
        if want.feature and step.shape is not None:
            kept += math.prod(step.shape(size, tokens)) * itemsize
        kept += real * step.heads if want.score else 0
        kept += real * step.keys(size, maps) * area(size) if want.maps else 0
    result.add((held + 2 * kept, 0))
    return result
