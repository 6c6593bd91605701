"""Units of work: an image to be accepted, and its tries."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from dsd_fast.generation.accept import Accept, Images, NearDuplicates, verdicts
from dsd_fast.generation.rows import GenerateRow, row_id_of
from dsd_fast.jobs import row_id

COLUMNS = {"tries": "string", "score": "float64"}
"""Of the index, beside a row's: the rejected tries as JSON, null where there is none; what an accepted image was judged
by, or null."""

NOT_ACCEPTED = "not-accepted"
"""The reason of a unit's row without an image."""

# Units that have been begun and whose turn has not come, in batches: an unlucky one holds up few.
_AHEAD = 4
_SEED_BITS = 63


@dataclass(frozen=True)
class Unit:
    """One image to be accepted. Its tries are rows that differ in their seeds.

    Attributes:
        row: that its tries are made of; its seed is the one that theirs come from.
        k: which of the images of its class it is; None of a row that stands for itself, whose own seed is the first
            try's.
    """

    row: GenerateRow
    k: int | None = None

    def attempt(self, j: int) -> GenerateRow:
        """Its try ``j``, from 0. Of the first one the unit's row in a folder has its id."""
        if self.k is None and j == 0:
            return self.row
        return replace(self.row, seed=try_seed(self.row.seed, self.row.label or "", self.k or 0, j))


@dataclass(frozen=True)
class Try:
    """A try that was rejected: its seed, the reason, a word, and the score that it was judged by, or None."""

    seed: int
    reason: str
    score: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a unit.

    Attributes:
        unit: itself.
        row: the accepted try, or None.
        image: of it, (H, W, 3) of 8 bits.
        score: that it was judged by, or None.
        rejected: the tries before it, or all of them, in order.
        vector: the CLIP embedding (E,) of the image, where near-duplicates are looked for.
    """

    unit: Unit
    row: GenerateRow | None = None
    image: Images | None = None
    score: float | None = None
    rejected: tuple[Try, ...] = ()
    vector: npt.NDArray[np.float32] | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """The values of :data:`COLUMNS`; seeds are text, since some readers of JSON hold 53 bits of a number."""
        tries = [{"seed": str(each.seed), "reason": each.reason, "score": each.score} for each in self.rejected]
        return {"tries": json.dumps(tries) if tries else None, "score": self.score}

    @property
    def message(self) -> str:
        """Of a unit without an accepted try, a sentence."""
        reasons = Counter(each.reason for each in self.rejected)
        said = ", ".join(f"{count} × {reason}" for reason, count in sorted(reasons.items()))
        return f"none of {len(self.rejected)} tries was accepted: {said}"


def try_seed(seed: int, label: str, k: int, j: int) -> int:
    """The seed of try ``j`` of image ``k`` of a class: 63 bits of BLAKE2b of all four.

    63, so that it is an int64 too.
    """
    return int(row_id("try", str(seed), label, str(k), str(j))[:16], 16) >> (64 - _SEED_BITS)


def units_of(rows: Iterable[GenerateRow], per_class: int | None = None) -> Iterator[Unit]:
    """Gives the units of work, one by one.

    Args:
        rows: that images are made of. Without ``per_class`` each is a unit by itself: its own seed is its first try's,
            further ones come from it.
        per_class: images of each label. All rows are read first. Image k of a class is made of its row (k mod their
            number), so that templates take turns, and those beyond ``per_class`` have none; the seeds of all its tries
            come from (that row's seed, label, k, try). The k-th image of every class comes before any class's next one:
            however far a job gets, the classes are balanced.

    Raises:
        ValueError: ``per_class`` is below 1; a row without a label, or two indices of one label.
    """
    if per_class is None:
        return map(Unit, rows)
    if per_class < 1:
        raise ValueError(f"per_class: got {per_class}, expected at least 1")
    return _of_classes(rows, per_class)


def _of_classes(rows: Iterable[GenerateRow], per_class: int) -> Iterator[Unit]:
    by_label: dict[str, list[GenerateRow]] = {}
    for row in rows:
        if row.label is None:
            raise ValueError(f"per_class: the row of the prompt {str(row.prompt)[:80]!r} has no label")
        others = by_label.setdefault(row.label, [])
        if others and others[0].cls != row.cls:
            raise ValueError(f"per_class: the label {row.label!r} has the indices {others[0].cls} and {row.cls}")
        others.append(row)
    for k in range(per_class):
        for own in by_label.values():
            yield Unit(own[k % len(own)], k)


def id_of(values: Mapping[str, Any], row: GenerateRow, digests: Sequence[str] = ()) -> str:
    """The id that a row of the index must have: of its first try, while it holds the accepted one.

    Args:
        values: the index's.
        row: that :func:`~dsd_fast.generation.rows.from_columns` makes of them.
        digests: see :func:`~dsd_fast.generation.rows.row_id_of`.
    """
    tries = json.loads(values.get("tries") or "[]")
    return row_id_of(replace(row, seed=int(tries[0]["seed"])) if tries else row, digests)


@dataclass
class _Running:
    """A unit that is being worked on."""

    number: int
    unit: Unit
    rejected: list[Try] = field(default_factory=list)
    vectors: list[npt.NDArray[np.float32]] = field(default_factory=list)

    @property
    def row(self) -> GenerateRow:
        return self.unit.attempt(len(self.rejected))


def accepted(
    units: Iterable[Unit],
    make: Callable[[Sequence[GenerateRow]], Images],
    accept: Accept | None,
    *,
    batch: int,
    max_tries: int = 10,
    near: NearDuplicates | None = None,
    group: Callable[[GenerateRow], Hashable] = lambda row: None,
) -> Iterator[Outcome]:
    """Gives the outcome of each unit, in the order of the units.

    Several units are worked on side by side, one try of each in a batch. A unit ends at its first accepted try, or
    after ``max_tries``, and the next one takes its place. Which tries a unit has depends on itself alone; how images
    differ by the batch that they are made in, beyond rounding, is up to ``make``.

    Args:
        units: taken as there is room; images of at most four batches wait for their turn.
        make: from rows of one group to (n, H, W, 3) images of 8 bits.
        accept: judges images and rows; None accepts all.
        batch: images made at once.
        max_tries: of a unit.
        near: rejects a try that is near to an earlier one of the same unit ("near-duplicate") and was not rejected
            otherwise: what was not good enough does not become so by the smallest change.
        group: of rows that can be made at once.

    Raises:
        ValueError: ``batch`` or ``max_tries`` is below 1, or what ``accept`` gives is no verdicts.
    """
    for name, value in (("batch", batch), ("max_tries", max_tries)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    return _accepted(enumerate(units), make, accept, batch, max_tries, near, group)


def _accepted(
    units: Iterator[tuple[int, Unit]],
    make: Callable[[Sequence[GenerateRow]], Images],
    accept: Accept | None,
    batch: int,
    max_tries: int,
    near: NearDuplicates | None,
    group: Callable[[GenerateRow], Hashable],
) -> Iterator[Outcome]:
    running: list[_Running] = []
    ended: dict[int, Outcome] = {}
    turn = 0
    while True:
        running += (_Running(*each) for each in islice(units, _AHEAD * batch - len(running) - len(ended)))
        if not running:
            return
        # The oldest first, since the others wait for them.
        kind = group(running[0].unit.row)
        chosen = list(islice((each for each in running if group(each.unit.row) == kind), batch))
        for each, outcome in zip(chosen, _judged(chosen, make, accept, max_tries, near), strict=True):
            if outcome is not None:
                ended[each.number] = outcome
        running = [each for each in running if each.number not in ended]
        while turn in ended:
            yield ended.pop(turn)
            turn += 1


def _judged(
    chosen: Sequence[_Running],
    make: Callable[[Sequence[GenerateRow]], Images],
    accept: Accept | None,
    max_tries: int,
    near: NearDuplicates | None,
) -> Iterator[Outcome | None]:
    """One try of each unit, and the outcome of those that end with it."""
    rows = [each.row for each in chosen]
    images = make(rows)
    vectors = [None] * len(rows) if near is None else list(near.vectors(images))
    for each, row, image, vector, verdict in zip(
        chosen, rows, images, vectors, verdicts(accept, images, rows), strict=True
    ):
        reason = "" if verdict.accepted else verdict.reason
        if verdict.accepted and near is not None and vector is not None and near.near(vector, each.vectors):
            reason = "near-duplicate"
        if not reason:
            # Not the batch that it is a part of.
            yield Outcome(each.unit, row, image.copy(), verdict.score, tuple(each.rejected), vector)
            continue
        each.rejected.append(Try(row.seed, reason, verdict.score))
        if vector is not None:
            each.vectors.append(vector)
        yield Outcome(each.unit, rejected=tuple(each.rejected)) if len(each.rejected) == max_tries else None
