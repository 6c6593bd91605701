"""A cut through a network: which steps run, what is taken from them, and which layers' keys and values they read."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from dsd_fast.unet.adapters import Signature, signature
from dsd_fast.unet.network import Network
from dsd_fast.unet.step import Step, Tapped, Want


@dataclass(frozen=True)
class Region:
    """Steps in a row that belong together: a residual block, a transformer block, a sampler.

    Attributes:
        steps: the steps, each with what is taken from it.
        layer: score id of the cross-attention whose keys they read.
        kind: equal for regions that compute the same with other weights.
        compiled: whether a runtime may compile it. Whole attention maps and bare steps are left as they are.
        checkpointed: whether it has activations to drop.
        silent: whether nothing is taken from its steps.
    """

    steps: Tapped
    layer: str | None
    kind: tuple[Any, ...]
    compiled: bool
    checkpointed: bool
    silent: bool


# Without comparison: what is kept for a cut (recordings, regions) is kept for that one, not for all that are equal.
@dataclass(frozen=True, eq=False, repr=False)
class Cut:
    """What was asked of a network, and what follows from it.

    Attributes:
        network: what is cut.
        features, scores, maps, noise_pred, pool: what was asked for.
        enter: the id whose kept activation it enters the network with, or None.
        entry: the step that does so, or None.
        steps: the steps that run, in order.
        wants: what is taken from each of them.
        boundary: how many of the steps depend neither on the text nor on what is kept, and run once per noised latent.
        kept_skips: numbers of the skip connections that a step uses; no other is kept.
        maps_text: whether maps of a cross-attention are asked for.
        reads_time: whether a step reads the time embedding.
        key_layers, value_layers: score ids whose keys, and whose values, the steps read.
        regions: the steps again, in the parts that a runtime compiles.
    """

    network: Network
    features: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    noise_pred: bool = False
    pool: str | float = "mean"
    enter: str | None = None
    entry: Step | None = field(init=False)
    steps: tuple[Step, ...] = field(init=False)
    wants: tuple[Want, ...] = field(init=False)
    boundary: int = field(init=False)
    kept_skips: frozenset[int] = field(init=False)
    maps_text: bool = field(init=False)
    reads_time: bool = field(init=False)
    key_layers: tuple[str, ...] = field(init=False)
    value_layers: tuple[str, ...] = field(init=False)
    regions: tuple[Region, ...] = field(init=False)

    def __post_init__(self) -> None:
        every, entry = self.network.steps, None
        if self.enter is not None:
            head, entry, rest = self.network.entered(self.enter)
            every = (*head, entry, *rest)
        shown = {*self.features, *([self.network.output_id] if self.noise_pred else [])}
        tapped = {*shown, *self.scores, *self.maps}
        end = max(i for i, step in enumerate(every) if step.name in tapped)
        steps = tuple(step for step in every[: end + 1] if not step.optional or step.name in self.features)
        wants = tuple(
            Want(
                feature=step.name in shown,
                score=step.name in self.scores,
                maps=step.name in self.maps,
                last=step is steps[-1],
                pool=self.pool,
            )
            for step in steps
        )
        pushes = sum(1 for step in every if step.pushes)
        pops = sum(1 for step in steps if step.pops)
        ran = {step.name for step in steps}
        cross = tuple(step.name for step in steps if step.score)
        # Past the guard of a frozen dataclass, which these attributes have from here on.
        vars(self).update(
            entry=entry,
            steps=steps,
            wants=wants,
            boundary=next((i for i, step in enumerate(steps) if step.reads_text or step is entry), len(steps)),
            kept_skips=frozenset(range(pushes - pops, pushes)),
            maps_text=any(name in self.maps for name in cross),
            reads_time=any(name in ran for name, _ in self.network.time_blocks),
            key_layers=tuple(dict.fromkeys(step.layer for step in steps if step.layer is not None)),
            value_layers=cross[:-1] if steps[-1].score else cross,
            regions=_regions(tuple(zip(steps, wants, strict=True))),
        )

    @property
    def reads_text(self) -> bool:
        """Whether a step reads the text."""
        return any(step.reads_text for step in self.steps)

    @property
    def compiled(self) -> bool:
        """Whether runs are computed in buckets, as compiled runtimes do."""
        return False

    def kept_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Give the (C, h, w) of one row of the activation it enters the network with; () where it enters at its start.

        Args:
            height, width: of the latents.
        """
        if self.entry is None or self.entry.shape is None:
            return ()
        return self.entry.shape(self.network.sizes(height, width)[self.entry.level], 0)

    def room(self, available: int) -> int:
        """Tell the bytes that a stream's activations may take where so many are available."""
        return available

    def signatures(self) -> dict[str, Signature]:
        """Tell what adapters do now to the key and value projections of each layer whose keys the steps read."""
        modules = {name: self.network.attention(name) for name in self.key_layers}
        return {name: signature([module.to_k, module.to_v]) for name, module in modules.items()}


def _regions(steps: Tapped) -> tuple[Region, ...]:
    result = []
    for name, group in groupby(steps, key=lambda pair: pair[0].region):
        inside = tuple(group)
        layer = next((step.layer for step, _ in inside if step.layer is not None), None)
        kind = tuple((step.name.removeprefix(name), step.level, want) for step, want in inside)
        bare = all(step.bare for step, _ in inside)
        compiled = not bare and not any(step.optional for step, _ in inside)
        silent = not any(want.feature or want.score or want.maps for _, want in inside)
        result.append(Region(inside, layer, kind, compiled, checkpointed=not bare, silent=silent))
    return tuple(result)
