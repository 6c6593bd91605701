"""What makes an adaptation generalise: the LoRA fit to few examples with one thing changed at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.suites import fit_quality as quality
from dsd_fast.bench.case import Context, Figure
from dsd_fast.matching import FitConfig, MatchConfig

GROUP = "ablation"
COUNT = 64
"""Examples of a fit."""
SHOWN = ("new scenes", "held-out pairs")


@dataclass(frozen=True)
class Change:
    """A fit that differs in one thing from the first of :data:`CHANGES`.

    Attributes:
        name: of the case.
        says: the line in the table.
        method: a key of :data:`fit_quality.METHODS`.
        fit: settings of :class:`FitConfig` that are others.
        score: settings of :class:`MatchConfig` that are others, in training and evaluation.
        kinds: negatives of the examples.
    """

    name: str
    says: str
    method: str = "lora"
    fit: Mapping[str, Any] = field(default_factory=dict)
    score: Mapping[str, Any] = field(default_factory=dict)
    kinds: Sequence[str] = quality.TRAINED_KINDS


CHANGES = (
    Change("base", "LoRA"),
    Change("own-draws", "LoRA, each candidate with its own timestep and noise", fit={"shared_noise": False}),
    Change("margin", "LoRA, margin loss", fit={"loss": "margin"}),
    Change("weight-decay", "LoRA, weight decay 0.01", fit={"weight_decay": 1e-2}),
    Change("one-negative", "LoRA, one negative an example, of another colour", kinds=("colour",)),
    Change("real-tokens", "LoRA, no padding in the attention term", score={"tokens": "real"}),
    Change("max-pool", "LoRA, largest position in the attention term", score={"pool": "max"}),
    Change("all-layers", "LoRA, all layers in the attention term", score={"layers": "all"}),
    Change("self-attention", "LoRA on self-attention too", fit={"attention": "all"}),
    Change("heads", "weights of heads of all layers", "heads", score={"layers": "all"}),
    Change(
        "heads-real-tokens",
        "weights of heads of all layers, no padding in the attention term",
        "heads",
        score={"layers": "all", "tokens": "real"},
    ),
)


def settings(change: Change, fit: FitConfig = quality.FIT) -> tuple[MatchConfig, FitConfig]:
    """The score and the fit of a change."""
    return replace(quality.OBJECTIVES["both"], **change.score), replace(fit, **change.fit)


def ablation(
    change: Change, context: Context, *, n: int = quality.N, count: int = COUNT, fit: FitConfig = quality.FIT
) -> list[Figure]:
    """The share right of two sets after one fit.

    Args:
        change: what differs.
        context: of the run.
        n: evaluation scenes of each set.
        count: examples.
        fit: settings that the change is applied to.
    """
    config, fit = settings(change, fit)
    found = quality.right_after(change.method, config, count, context, n=n, fit=fit, fits=1, kinds=change.kinds)
    return [
        quality.mean_over_fits(f"{change.says}; {each.name}, {count} examples", each, right, count, GROUP)
        for (each, part), right in found.items()
        if part == "both" and each.name in SHOWN
    ]
