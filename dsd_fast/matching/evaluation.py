"""How often a matcher is right about groups: accuracy, R@k, ranks, Winoground scores, and how sure they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsd_fast.matching.group_results import PARTS, GroupResult, check_conventions, judge
from dsd_fast.matching.group_scores import score_groups
from dsd_fast.matching.groups import drawn_groups
from dsd_fast.matching.matcher import Matcher
from dsd_fast.metrics import bootstrap, mean_reciprocal_rank, median_rank, recall_at, wilson

Figures = dict[str, "Figure"]


@dataclass(frozen=True)
class Figure:
    """A figure of merit.

    Attributes:
        value: from 0 to 1, but for a median rank.
        n: groups it was counted on.
        bootstrap: its 95 % percentile bootstrap interval over clusters of groups (:attr:`GroupResult.cluster`).
        wilson: of a share the 95 % Wilson interval, as if all groups were independent; else None.
        chance: of a share of ranks its value for scores without meaning; else None.
    """

    value: float
    n: int
    bootstrap: tuple[float, float]
    wilson: tuple[float, float] | None = None
    chance: float | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Results of groups, and their figures.

    Figures of groups with one question: "accuracy", which is "R@1"; "R@5" where a group has more than 5 candidates;
    "mean_reciprocal_rank"; "median_rank". Of paired groups: "text", "image" and "group" (Winoground, Thrush et al.
    2022). A group with an image or a text that cannot be used counts in no figure. One whose right candidate's score,
    or that of a candidate it is compared with, is no number counts as wrong.

    Attributes:
        results: of all groups, in order.
        figures: by name; without those that no group has.
        by_category: the same of each category, in alphabetical order; empty where no group has one.
        parts: the evaluations of the "attention" and the "noise" part alone, where they were asked for.
    """

    results: tuple[GroupResult, ...]
    figures: Figures
    by_category: Mapping[str, Figures] = field(default_factory=dict)
    parts: Mapping[str, Evaluation] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Iterable[GroupResult], *, resamples: int = 1000, seed: int = 0) -> Evaluation:
        """The evaluation of results, as from :func:`evaluate_iter`.

        Args:
            results: of groups.
            resamples, seed: of the bootstrap.
        """
        every = tuple(results)
        names = sorted({result.category for result in every})
        by_category = {
            name: _figures([result for result in every if result.category == name], resamples, seed) for name in names
        }
        parts = list(every[0].parts) if every else []
        return cls(
            every,
            _figures(every, resamples, seed),
            by_category if names not in ([], [""]) else {},
            {part: cls.of([result.parts[part] for result in every], resamples=resamples, seed=seed) for part in parts},
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many groups there are, are scored, are failures, and are scored with a value that is not finite."""
        failures = sum(result.failure is not None for result in self.results)
        return {
            "groups": len(self.results),
            "scored": len(self.results) - failures,
            "errors": failures,
            "not_finite": sum(not result.finite for result in self.results),
        }


def evaluate(
    matcher: Matcher,
    groups: Iterable[Any],
    *,
    batch_mean: int | None = None,
    ties: str = "wrong",
    parts: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Scores groups and counts how often the right candidate wins.

    Each pair is scored by itself, and a tie is a mistake. The official code does neither: `batch_mean` and `ties` are
    its conventions, for comparison with published figures. Its score itself is ``MatchConfig(official=True)``.

    Args:
        matcher: scores the pairs.
        groups: :class:`~dsd_fast.matching.groups.Group`, or tuples that its `of` takes.
        batch_mean: B; the attention term of the k-th candidate is its mean over each B consecutive groups, the right
            candidate standing first, as if one network call of the official code held them. One value is then shared
            by B questions, so that an attention term that is right about a pair 60 % of the time is right about 84.5 %
            of the batches of 16. With ``official=True`` the unconditional rows count in it, as there.
        ties: "wrong", a candidate that scores as much as the right one stands before it; or "right", behind it, as
            under the official argmax.
        parts: whether the attention and the noise-prediction part are evaluated apart too; nothing is scored twice. A
            part of weight 0 is left out.
        resamples, seed: of the bootstrap intervals.

    Raises:
        ValueError: an argument that is not allowed, by name; an image or a text that cannot be used is no error, see
            :class:`Evaluation`.
    """
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples}, expected at least 1")
    results = evaluate_iter(matcher, groups, batch_mean=batch_mean, ties=ties, parts=parts)
    return Evaluation.of(results, resamples=resamples, seed=seed)


def evaluate_iter(
    matcher: Matcher,
    groups: Iterable[Any],
    *,
    batch_mean: int | None = None,
    ties: str = "wrong",
    parts: bool = False,
) -> Iterator[GroupResult]:
    """:func:`evaluate` one group at a time, in order, for :meth:`Evaluation.of`. Arguments are checked at the call."""
    every = list(drawn_groups(groups))
    check_conventions(every, batch_mean, ties)
    config = matcher.config
    weights = {"attention": config.attention_weight, "noise": config.noise_weight}
    wanted = [part for part in PARTS if parts and weights[part]]
    return judge(every, score_groups(matcher, every), batch_mean=batch_mean, ties=ties, parts=wanted)


def _figures(results: Sequence[GroupResult], resamples: int, seed: int) -> Figures:
    one = [result for result in results if result.rank is not None]
    paired = [result for result in results if result.paired is not None]
    return _rank_figures(one, resamples, seed) | _paired_figures(paired, resamples, seed)


def _rank_figures(results: Sequence[GroupResult], resamples: int, seed: int) -> Figures:
    if not results:
        return {}
    rank = np.array([result.rank for result in results])
    candidates = np.array([0 if result.scores is None else len(result.scores) for result in results])
    ks = {"accuracy": 1, "R@1": 1} | ({"R@5": 5} if candidates.max() > 5 else {})
    # The statistic runs once per resample: what it can find of each group beforehand is found beforehand.
    each = np.stack([*(rank <= k for k in ks.values()), 1 / rank, rank], 1)
    bounds = _bounds(results, each, lambda x: [*x[:, :-1].mean(0), np.median(x[:, -1])], resamples, seed)
    values = [*(recall_at(rank, k) for k in ks.values()), mean_reciprocal_rank(rank), median_rank(rank)]
    names, n = [*ks, "mean_reciprocal_rank", "median_rank"], len(rank)
    figures = {name: Figure(value, n, own) for name, value, own in zip(names, values, bounds, strict=True)}
    for name, k in ks.items():
        chance = float((np.minimum(k, candidates) / candidates).mean())
        figures[name] = replace(figures[name], wilson=wilson(int((rank <= k).sum()), n), chance=chance)
    return figures


def _paired_figures(results: Sequence[GroupResult], resamples: int, seed: int) -> Figures:
    if not results:
        return {}
    names = ("text", "image", "group")
    right = np.array([[result.paired[name] for name in names] for result in results if result.paired is not None])
    bounds, n = _bounds(results, right, lambda sample: sample.mean(0), resamples, seed), len(right)
    return {
        name: Figure(float(own.mean()), n, interval, wilson(int(own.sum()), n))
        for name, own, interval in zip(names, right.T, bounds, strict=True)
    }


def _bounds(
    results: Sequence[GroupResult],
    values: NDArray[Any],
    statistic: Callable[[NDArray[Any]], ArrayLike],
    resamples: int,
    seed: int,
) -> list[tuple[float, float]]:
    """Bootstrap intervals of the numbers of a statistic, over clusters of the results."""
    clusters = [result.cluster for result in results]
    low, high = bootstrap(values, statistic, clusters=clusters, resamples=resamples, seed=seed)
    return list(zip(low.tolist(), high.tolist(), strict=True))
