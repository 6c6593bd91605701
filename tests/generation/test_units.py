"""Units of work: what is accepted depends on each of them alone, and is what a plain loop accepts."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dsd_fast.generation.accept import Verdict
from dsd_fast.generation.grids import grid
from dsd_fast.generation.rows import GenerateRow, columns, from_columns, row_id_of
from dsd_fast.generation.units import COLUMNS, Unit, accepted, id_of, try_seed, units_of


class Maker:
    """Images that show their seeds, and a count of them."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append(list(rows))
        return np.stack([np.random.default_rng(row.seed).integers(0, 256, (2, 2, 3), dtype=np.uint8) for row in rows])


def judge(images, rows):
    scores = [int(image[0, 0, 0]) / 256 for image in images]
    # A judge may have a reason for what it accepts, too.
    return [Verdict(score >= 0.7, "high" if score >= 0.7 else "low", score) for score in scores]


class Corner:
    """Near are images whose last value agrees in its highest two bits."""

    def vectors(self, images):
        return np.stack([np.eye(4, dtype=np.float32)[image[-1, -1, -1] >> 6] for image in images])

    def near(self, vector, others):
        return any(float(vector @ other) > 0.5 for other in others)


def one_by_one(units, max_tries, near):
    """What a plain loop accepts: unit by unit, try by try."""
    for unit in units:
        tries, seen = [], []
        for j in range(max_tries):
            row = unit.attempt(j)
            image = Maker()([row])
            (verdict,) = judge(image, [row])
            reason, corner = "" if verdict.accepted else verdict.reason, int(image[0, -1, -1, -1]) >> 6
            if verdict.accepted and near and corner in seen:
                reason = "near-duplicate"
            if not reason:
                yield row, image[0].tolist(), verdict.score, tries
                break
            tries.append((row.seed, reason, verdict.score))
            seen.append(corner)
        else:
            yield None, None, None, tries


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_what_is_accepted_is_what_a_plain_loop_accepts(batch, near):
    units = list(units_of(grid(["a {}", "the {}"], ["cat", "dog", "emu"], 5), per_class=9))
    make, taken = Maker(), []

    def given():
        for unit in units:
            taken.append(unit)
            yield unit

    found = []
    for outcome in accepted(given(), make, judge, batch=batch, max_tries=5, near=Corner() if near else None):
        # Little waits for an unlucky unit.
        assert len(taken) - len(found) <= 4 * batch
        found.append(outcome)
    assert [
        (
            outcome.row,
            None if outcome.image is None else outcome.image.tolist(),
            outcome.score,
            [(each.seed, each.reason, each.score) for each in outcome.rejected],
        )
        for outcome in found
    ] == list(one_by_one(units, 5, near))
    assert [outcome.unit for outcome in found] == units
    # No image more than the loop makes, and full batches as long as there are units.
    assert sum(map(len, make.batches)) == sum(len(each.rejected) + (each.row is not None) for each in found)
    assert {len(rows) for rows in make.batches[: max(1, len(units) // batch)]} == {min(batch, len(units))}
    reasons = Counter(each.reason for outcome in found for each in outcome.rejected)
    assert (reasons["near-duplicate"] > 0) == near
    assert any(outcome.row is None for outcome in found)


def test_rows_of_unequal_groups_are_made_apart():
    rows = [GenerateRow("a", seed, size=(8, 8 * (1 + seed % 2))) for seed in range(10)]
    make = Maker()
    found = list(accepted(map(Unit, rows), make, None, batch=3, group=lambda row: row.size))
    assert [outcome.row for outcome in found] == rows
    assert all(len({row.size for row in batch}) == 1 for batch in make.batches)
    assert sorted(map(len, make.batches)) == [2, 2, 3, 3]


def test_images_of_each_class_take_turns_among_templates_and_classes():
    units = list(units_of(grid(["a {}", "the {}"], ["cat", "dog"], [5]), per_class=3))
    assert [(unit.row.prompt, unit.k) for unit in units] == [
        ("a cat", 0), ("a dog", 0), ("the cat", 1), ("the dog", 1), ("a cat", 2), ("a dog", 2),
    ]  # fmt: skip
    seeds = [unit.attempt(j).seed for unit in units for j in range(100)]
    assert len(set(seeds)) == 600
    assert max(seeds) < 2**63
    assert seeds[:2] == [try_seed(5, "cat", 0, 0), try_seed(5, "cat", 0, 1)]
    # Folders that were made before go on with the same.
    assert try_seed(5, "cat", 0, 0) == 3976088515700829256
    for rows, wrong in (
        ([GenerateRow("a")], "the row of the prompt 'a' has no label"),
        ([GenerateRow("a", label="x", cls=0), GenerateRow("b", label="x", cls=1)], "'x' has the indices 0 and 1"),
    ):
        with pytest.raises(ValueError, match=f"per_class: .*{wrong}"):
            list(units_of(rows, 1))
    with pytest.raises(ValueError, match="per_class: got 0, expected at least 1"):
        units_of([], 0)


def test_a_row_by_itself_begins_with_its_own_seed():
    (unit,) = units_of([GenerateRow("a", 7)])
    assert unit.attempt(0) == unit.row
    assert unit.attempt(1) == replace(unit.row, seed=try_seed(7, "", 0, 1))


@pytest.mark.parametrize("per_class", [None, 4])
def test_the_index_tells_the_rejected_tries_and_keeps_the_first_ones_id(per_class):
    rows = grid("a {}", ["cat"], range(8)) if per_class is None else grid("a {}", ["cat"], 3)
    outcomes = list(accepted(units_of(rows, per_class), Maker(), judge, batch=2, max_tries=20))
    assert any(outcome.rejected for outcome in outcomes)
    for outcome in outcomes:
        values = {**columns(outcome.row), **outcome.columns}
        assert COLUMNS.keys() <= values.keys()
        assert from_columns(values) == outcome.row
        assert id_of(values, outcome.row) == row_id_of(outcome.unit.attempt(0))
        tries = json.loads(values["tries"] or "[]")
        assert [int(each["seed"]) for each in tries] == [outcome.unit.attempt(j).seed for j in range(len(tries))]
        assert all(each["reason"] == "low" and each["score"] < 0.7 for each in tries)


def test_a_unit_without_an_accepted_try_says_why():
    def never(images, rows):
        return [False] * len(images)

    (outcome,) = accepted([Unit(GenerateRow("a"))], Maker(), never, batch=4, max_tries=3)
    assert outcome.row is outcome.image is None
    assert outcome.message == "none of 3 tries was accepted: 3 × rejected"
    for name in ("batch", "max_tries"):
        with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
            accepted([], Maker(), None, **{"batch": 1, "max_tries": 1, name: 0})
