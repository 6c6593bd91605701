"""A step of the network, and the state that travels from step to step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsd_fast.unet.pieces import Layers
from dsd_fast.unet.text import LayerText

Size = tuple[int, int]
Count = Callable[[Size, int], int]


class RowIndex(NamedTuple):
    """What the requested rows are.

    Attributes:
        latent, text: (B,) int64; None means row b is latent b, text b.
        tokens: (B, n) int64, the tokens whose maps are asked for; None where none are.
    """

    latent: Tensor | None = None
    text: Tensor | None = None
    tokens: Tensor | None = None


@dataclass
class State:
    """What travels from step to step.

    Values have one row per noised latent (P) until the first step that reads the text, and one per requested row (B)
    from there on; :meth:`expand` is the passage. Skip connections stay as they were pushed until they are used.

    Attributes:
        embedding: (P, E) time embedding, (B, E) where it depends on the text.
        activated: whether ``embedding`` has been through the activation that all residual blocks have.
        index: which latent and text each row has.
        sizes: image size at each level.
        keep: numbers of the skip connections that the plan will use.
        layers: what steps call for the layers.
        text: the texts as the attention layer of the running step sees them.
        kept: (B, C, h, w), the activation that a plan enters the network with; None where it enters at its start.
        live: values that later steps read, by name; at first "x", the (P, C, h, w) noised latents.
    """

    embedding: Tensor
    index: RowIndex
    sizes: Sequence[Size]
    keep: frozenset[int]
    layers: Layers
    text: LayerText | None = None
    residuals: tuple[Sequence[Tensor], Tensor] | None = None
    kept: Tensor | None = None
    activated: bool = True
    embedding_expanded: bool = False
    expanded: bool = False
    live: dict[str, Tensor] = field(default_factory=dict)
    skips: list[tuple[int, Tensor, bool]] = field(default_factory=list)
    pushed: int = 0

    def rows(self, value: Tensor, expanded: bool) -> Tensor:
        """``value`` with one row per requested row."""
        index = self.index.latent
        if expanded or index is None:
            return value
        if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
            # index_select itself would answer in the layout (rows, C, h, w).
            return value.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
        return value.index_select(0, index)

    def expand(self) -> None:
        """From one row per latent to one per requested row."""
        if not self.expanded:
            self.live = {name: self.rows(value, False) for name, value in self.live.items()}
            self.expanded = True

    def push(self, value: Tensor) -> None:
        """Store a skip connection, if the plan will use it."""
        if self.pushed in self.keep:
            self.skips.append((self.pushed, value, self.expanded))
        self.pushed += 1

    def pop(self) -> Tensor:
        """The latest skip connection, with its ControlNet residual, one row per requested row."""
        index, value, expanded = self.skips.pop()
        value = self.rows(value, expanded)
        return value if self.residuals is None else value + self.residuals[0][index]

    def project_time(self, projection: Any, activation: Any) -> Tensor:
        """A block's projection of the time embedding, (rows, C); projected before rows are repeated."""
        embedding = self.embedding if self.activated else activation(self.embedding)
        value = self.layers.linear(embedding, projection)
        return self.rows(value, self.embedding_expanded) if self.expanded else value


@dataclass(frozen=True)
class Want:
    """What a plan takes from a step, besides its ordinary work.

    Attributes:
        feature: the value the step's layer id names.
        score: the score of a cross-attention: ``pool`` is "mean", "max" or a temperature.
        maps: the attention maps, averaged over heads: of chosen tokens, or of all positions of a self-attention.
        last: nothing runs after this step, so only what is taken from it need be computed.
    """

    feature: bool = False
    score: bool = False
    maps: bool = False
    last: bool = False
    pool: str | float = "mean"


class Taken(NamedTuple):
    """What a step gives: the value its id names, a cross-attention's score (rows, H), and maps (rows, n, h, w)."""

    feature: Tensor | None = None
    score: Tensor | None = None
    maps: Tensor | None = None


NOTHING = Taken()


@dataclass(frozen=True)
class Step:
    """One step of the program.

    Attributes:
        name: the layer id whose value the step gives, a score id, or a name of its own.
        level: how many downsamplings precede its output.
        run: the work; (state, want) → what is taken. It knows neither its name nor its place, so that equal blocks
            share compiled code.
        flops: FLOPs of one row, from the image size at ``level`` and the number of text tokens.
        elements: elements alive at the step's peak for one row, skip connections and outputs aside; same arguments.
        region: steps in a row of the same region are compiled together.
        shape: shape of one row's value, from the same arguments; None for a step whose name is no layer id.
        layer: score id of the cross-attention whose keys it reads.
        score: whether ``name`` is a score id.
        reads_text: whether it needs the text, so that it and all after it run once per row.
        optional: left out unless it is tapped.
        bare: neither compiled nor checkpointed, having nothing to fuse and no activations to drop.
        pushes: channels of the skip connection it stores; 0 where it stores none.
        pops: whether it uses a skip connection.
        heads: heads of the attention it computes.
        map_flops: FLOPs of the maps of a self-attention, one for each position; None for all other steps.
    """

    name: str
    level: int
    run: Callable[[State, Want], Taken]
    flops: Count
    elements: Count
    region: str
    shape: Callable[[Size, int], tuple[int, ...]] | None = None
    layer: str | None = None
    score: bool = False
    reads_text: bool = False
    optional: bool = False
    bare: bool = False
    pushes: int = 0
    pops: bool = False
    heads: int = 0
    map_flops: Count | None = None

    @property
    def self_maps(self) -> bool:
        """Whether it answers the maps of a self-attention."""
        return self.map_flops is not None

    def keys(self, size: Size, tokens: int) -> int:
        """What its attention attends to, and so the most maps it answers, for an image of that size."""
        return area(size) if self.self_maps else tokens


# Steps in a row, each with what is taken from it.
Tapped = tuple[tuple[Step, Want], ...]


def area(size: Size) -> int:
    """Positions of an image of that size."""
    return size[0] * size[1]


def grid(tokens: Tensor, size: Size) -> Tensor:
    """(B, h·w, C) → (B, C, h, w), a view."""
    rows, _, channels = tokens.shape
    return tokens.view(rows, *size, channels).permute(0, 3, 1, 2)


def flat(image: Tensor) -> Tensor:
    """(B, C, h, w) → (B, h·w, C)."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)
