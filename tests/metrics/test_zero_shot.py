import numpy as np
import pytest

from dsd_fast.metrics import best_penalty, class_means, stacked, zero_shot

SEEN = np.array([True, True, False, False])


def drawn(seed, n=60):
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, n, p=[0.6, 0.1, 0.25, 0.05])
    scores = rng.dirichlet(np.full(4, 0.7), n) + 0.4 * np.eye(4)[labels]
    return scores / scores.sum(1, keepdims=True), labels


def test_from_counts_made_by_hand():
    # Class 0: 3 images, 2 right; 1: 1 of 1; 2: 1 of 4, and 3 of 4 among the unseen; 3: 1 of 2.
    labels = [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]
    picks = [0, 0, 3, 1, 2, 0, 0, 3, 3, 1]
    second = [1, 1, 0, 0, 3, 2, 2, 2, 2, 2]
    scores = np.zeros((10, 4))
    scores[range(10), second], scores[range(10), picks] = 0.3, 0.6
    found = zero_shot(scores, labels, SEEN)
    np.testing.assert_allclose(found.per_class, [2 / 3, 1, 1 / 4, 1 / 2])
    assert found.s == pytest.approx((2 / 3 + 1) / 2)
    assert found.u == pytest.approx((1 / 4 + 1 / 2) / 2)
    # A mean over images would be 4 / 10.
    assert found.h == pytest.approx(2 * found.u * found.s / (found.u + found.s))
    assert found.t1 == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_a_penalty_of_0_is_the_plain_argmax_and_one_above_1_leaves_no_seen_class():
    scores, labels = drawn(0)
    np.testing.assert_array_equal(stacked(scores, SEEN, 0), scores.argmax(1))
    assert not SEEN[stacked(scores, SEEN, 1.01)].any()
    whole = zero_shot(scores, labels, SEEN, 1.01)
    assert (whole.s, whole.h) == (0, 0)
    assert whole.u == whole.t1 == zero_shot(scores, labels, SEEN).t1


@pytest.mark.parametrize("seed", range(5))
def test_no_penalty_of_a_fine_grid_is_better_than_the_best(seed):
    scores, labels = drawn(seed)
    best = best_penalty(scores, labels, SEEN)
    grid = max(zero_shot(scores, labels, SEEN, penalty).h for penalty in np.linspace(0, 1, 2001))
    assert 0 <= best < 1
    assert zero_shot(scores, labels, SEEN, best).h >= grid - 1e-12


def test_classes_without_images_count_in_no_mean():
    labels = np.array([0, 0, 2])
    found = zero_shot(np.eye(4)[[0, 2, 2]], labels, SEEN)
    assert (found.s, found.u) == (0.5, 1)
    np.testing.assert_array_equal(np.isnan(found.per_class), [False, True, False, True])
    assert np.isnan(class_means([], [], 2)).all()
    # The only image of class 1 is not there, so that half of the mean is not lost either.
    assert zero_shot(np.eye(4)[[0, 2, 2]], labels, SEEN, best_penalty(np.eye(4)[[0, 2, 2]], labels, SEEN)).h > 0.6


@pytest.mark.parametrize(
    ("scores", "labels", "seen", "name"),
    [
        (np.full((2, 4), np.nan), [0, 2], SEEN, "scores"),
        (np.zeros((2, 4)), [0, 4], SEEN, "labels"),
        (np.zeros((2, 4)), [0.0, 2.0], SEEN, "labels"),
        (np.zeros((2, 4)), [0, 1, 2], SEEN, "labels"),
        (np.zeros((2, 4)), [0, 1], SEEN, "no image of unseen"),
        (np.zeros((2, 4)), [2, 3], SEEN, "no image of seen"),
        (np.zeros((2, 4)), [0, 2], [1, 1, 0, 0], "seen"),
    ],
)
def test_refuses(scores, labels, seen, name):
    for function in (zero_shot, best_penalty):
        with pytest.raises(ValueError, match=name):
            function(scores, labels, seen)
