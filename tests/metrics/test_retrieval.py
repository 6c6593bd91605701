"""Ranks, recall and Winoground scores, against scipy's ranks and inequalities written out."""

import itertools

import numpy as np
import pytest
import torch

from dsd_fast.metrics import mean_reciprocal_rank, median_rank, ranks, recall_at, winoground

NAN = float("nan")


@pytest.mark.parametrize(("ties", "method"), [("wrong", "max"), ("right", "min")])
def test_ranks_are_scipys(ties, method):
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    # Few values, so that most rows have ties.
    scores, label = draw.integers(0, 5, (4, 50, 7)).astype(np.float32), draw.integers(0, 7, (4, 50))
    want = np.take_along_axis(stats.rankdata(-scores, method=method, axis=-1), label[..., None], -1)[..., 0]
    found = ranks(scores, label, ties=ties)
    assert found.dtype == np.int64
    assert found.tolist() == want.tolist()
    assert (
        ranks(torch.from_numpy(scores), 2, ties=ties).tolist() == ranks(scores, np.full((4, 50), 2), ties=ties).tolist()
    )


@pytest.mark.parametrize(
    ("scores", "label", "wrong", "right"),
    [
        ([3, 2, 1], 0, 1, 1),
        ([3, 2, 1], 2, 3, 3),
        ([2, 2, 1], 0, 2, 1),
        ([5, 5, 5, 5], 1, 4, 1),
        # What has no score stands before the right candidate, and a right candidate without one is last.
        ([3, NAN, 1], 0, 2, 2),
        ([NAN, 2, 1], 0, 3, 3),
        ([NAN, NAN], 0, 2, 2),
        ([np.inf, np.inf, 0], 1, 2, 1),
        ([-np.inf, NAN, 0], 0, 3, 3),
        ([1], 0, 1, 1),
    ],
)
def test_ties_and_missing_scores(scores, label, wrong, right):
    assert ranks(scores, label) == wrong
    assert ranks(scores, label, ties="right") == right


def test_figures_of_ranks():
    found = [1, 4, 2, 1, 10, 6]
    assert [recall_at(found, k) for k in (1, 2, 5, 10)] == [2 / 6, 3 / 6, 4 / 6, 1]
    assert median_rank(found) == 3
    assert median_rank([1, 7, 2]) == 2
    assert mean_reciprocal_rank([1, 4, 2]) == pytest.approx((1 + 0.25 + 0.5) / 3)


def inequalities(s):
    """Thrush et al. 2022, equations 1 to 3; s[i][t] is image i with text t."""
    text = s[0][0] > s[0][1] and s[1][1] > s[1][0]
    image = s[0][0] > s[1][0] and s[1][1] > s[0][1]
    return [text, image, text and image]


def test_winoground_scores_are_the_papers_inequalities():
    # Every order of four scores, ties and missing ones included.
    every = list(itertools.product((0.0, 1.0, 2.0, 3.0, NAN), repeat=4))
    scores = np.array(every).reshape(-1, 2, 2)
    want = [inequalities(matrix) for matrix in scores.tolist()]
    assert np.stack(winoground(scores), 1).tolist() == want
    assert winoground(scores.reshape(5, -1, 2, 2)).group.shape == (5, 125)
    strict = [len(set(row)) == 4 for row in every]
    at_chance = np.array(want)[strict]
    # Of the 24 orders of four different scores: the paper's chance of 25, 25 and 16.67 %.
    assert at_chance[~np.isnan(scores).any((1, 2))[strict]].mean(0).tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 6])


def test_winoground_of_more_than_two():
    scores = np.array([[3.0, 1, 2], [0, 5, 4], [1, 2, 6]])
    assert [bool(x) for x in winoground(scores)] == [True, True, True]
    # Image 1 prefers text 2, which prefers its own image.
    scores[1, 2] = 5.5
    assert [bool(x) for x in winoground(scores)] == [False, True, False]
    # Text 2 prefers image 1 too.
    scores[1, 2] = 7
    assert [bool(x) for x in winoground(scores)] == [False, False, False]
    assert [bool(x) for x in winoground(scores.T)] == [False, False, False]
    scores[1, 2] = 5.0
    assert [bool(x) for x in winoground(scores)] == [False, True, False]
    assert [bool(x) for x in winoground(scores.T)] == [True, False, False]
    assert [bool(x) for x in winoground(scores, ties="right")] == [True, True, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranks([1, 2], 2), "label: got 2, expected integers from 0 to 1"),
        (lambda: ranks([1, 2], -1), "label: got -1"),
        (lambda: ranks([1, 2], 0.0), "label: got 0.0"),
        (lambda: ranks([[1, 2]], [0, 1]), r"label: got shape \(2,\), expected one or \(1,\)"),
        (lambda: ranks([], 0), r"scores: got shape \(0,\), expected candidates along the last axis"),
        (lambda: ranks(1.0, 0), "scores: got shape"),
        (lambda: ranks([1], 0, ties="first"), "ties: got 'first', expected 'wrong' or 'right'"),
        (lambda: recall_at([], 1), "rank: got none"),
        (lambda: recall_at([0, 1], 1), "rank: got 0, expected at least 1"),
        (lambda: recall_at([1], 0), "k: got 0"),
        (lambda: median_rank([]), "rank: got none"),
        (lambda: winoground([1, 2]), r"scores: got shape \(2,\), expected \(…, n, n\) with n of at least 2"),
        (lambda: winoground([[1]]), r"scores: got shape \(1, 1\)"),
        (lambda: winoground(np.zeros((2, 3))), r"scores: got shape \(2, 3\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
