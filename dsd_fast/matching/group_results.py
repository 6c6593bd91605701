"""Scores of groups to ranks: which candidate wins, under the official code's conventions or without them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from dsd_fast.matching.group_scores import Failure, GroupScores
from dsd_fast.matching.groups import Group
from dsd_fast.matching.pairs import image_key
from dsd_fast.metrics import ranks, winoground

PARTS = ("attention", "noise")


@dataclass(frozen=True, eq=False)
class GroupResult:
    """How one group was answered.

    Attributes:
        index: position among the groups evaluated.
        id, category: the group's.
        label: position of the right candidate.
        cluster: equal for results that are no independent evidence: they share the right image (of a paired group the
            first image), or a batch mean.
        scores: float32, (K,) of a group's candidates, or (n, n) of a paired group, image i with text j at [i, j]; None
            after a failure.
        rank: of the right candidate, from 1; None of a paired group and after a failure.
        paired: whether a paired group is right by its "text", its "image" and its "group" score, see
            :func:`dsd_fast.metrics.winoground`; else None.
        failure: why there are no scores, or None.
        parts: the same by "attention" and by "noise" alone, where that was asked for.
    """

    index: int
    id: str
    category: str
    label: int
    cluster: Hashable
    scores: NDArray[np.float32] | None = None
    rank: int | None = None
    paired: Mapping[str, bool] | None = None
    failure: Failure | None = None
    parts: Mapping[str, GroupResult] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether all scores are finite numbers; true without scores."""
        return self.scores is None or bool(np.isfinite(self.scores).all())


def check_conventions(groups: Sequence[Group], batch_mean: int | None, ties: str) -> None:
    """Refuses what groups cannot be judged by.

    Raises:
        ValueError: `ties` is neither "wrong" nor "right", `batch_mean` is no integer of at least 1, or the groups of a
            batch differ in their numbers of images or texts.
    """
    if ties not in ("wrong", "right"):
        raise ValueError(f"ties: got {ties!r}, expected 'wrong' or 'right'")
    if batch_mean is None:
        return
    if not isinstance(batch_mean, int) or isinstance(batch_mean, bool) or batch_mean < 1:
        raise ValueError(f"batch_mean: got {batch_mean!r}, expected an integer of at least 1")
    for start in range(0, len(groups), batch_mean):
        shapes = {(len(group.images), len(group.texts)) for group in groups[start : start + batch_mean]}
        if len(shapes) > 1:
            images, texts = zip(*shapes, strict=True)
            raise ValueError(
                f"batch_mean: groups {start} to {min(start + batch_mean, len(groups)) - 1} have {_either(images)} "
                f"images and {_either(texts)} texts, expected as many in all groups of a batch"
            )


def judge(
    groups: Sequence[Group],
    found: Iterable[GroupScores | Failure],
    *,
    batch_mean: int | None = None,
    ties: str = "wrong",
    parts: Sequence[str] = (),
) -> Iterator[GroupResult]:
    """The result of each group, in order, as soon as its batch is there.

    Args:
        groups: with what was found for each, as from :func:`~dsd_fast.matching.group_scores.score_groups`.
        found: as many, or fewer.
        batch_mean: as for :func:`~dsd_fast.matching.evaluation.evaluate`; :func:`check_conventions` has accepted it.
        ties: as there.
        parts: of :data:`PARTS`, judged apart too.
    """
    scores, size = iter(found), batch_mean or 1
    for start in range(0, len(groups), size):
        batch = list(islice(scores, size))
        own = groups[start : start + len(batch)]
        if batch_mean is not None:
            batch = _share_attention(own, batch)
        for index, (group, item) in enumerate(zip(own, batch, strict=True), start):
            cluster = image_key(group.right_image)
            yield _result(index, group, item, cluster if batch_mean is None else start, ties, parts)


def _share_attention(groups: Sequence[Group], batch: Sequence[GroupScores | Failure]) -> list[GroupScores | Failure]:
    """Each candidate's attention term becomes its mean over the batch; failures take no part.

    The official data put the right candidate first, so it is the right ones that share a mean, whatever their labels.
    """
    scored = {place: item for place, item in enumerate(batch) if isinstance(item, GroupScores)}
    if not scored:
        return list(batch)
    orders = {place: _right_first(groups[place]) for place in scored}
    mean = np.mean([item.attention.flatten()[orders[place]] for place, item in scored.items()], axis=0)
    shared = list(batch)
    for place, item in scored.items():
        attention = np.empty_like(mean)
        attention[orders[place]] = mean
        shared[place] = GroupScores(attention.reshape(item.attention.shape), item.noise)
    return shared


def _right_first(group: Group) -> NDArray[np.int64]:
    places = np.arange(len(group.images) * len(group.texts))
    return places if group.paired else np.concatenate([places[[group.label]], np.delete(places, group.label)])


def _result(
    index: int, group: Group, item: GroupScores | Failure, cluster: Hashable, ties: str, parts: Sequence[str]
) -> GroupResult:
    def result(values: NDArray[np.float64] | None, apart: Mapping[str, GroupResult]) -> GroupResult:
        scores, rank, paired = None, None, None
        if values is not None:
            scores = values.astype(np.float32)
            if group.paired:
                paired = {name: bool(right) for name, right in winoground(scores, ties=ties)._asdict().items()}
            else:
                scores = scores.flatten()
                rank = int(ranks(scores, group.label, ties=ties))
        failure = item if isinstance(item, Failure) else None
        return GroupResult(index, group.id, group.category, group.label, cluster, scores, rank, paired, failure, apart)

    if isinstance(item, Failure):
        return result(None, {part: result(None, {}) for part in parts})
    each = {"attention": item.attention, "noise": item.noise}
    return result(item.attention + item.noise, {part: result(each[part], {}) for part in parts})


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(str(number) for number in sorted(set(numbers)))
