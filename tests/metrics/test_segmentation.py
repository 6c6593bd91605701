"""Segmentation metrics, by hand and against scikit-learn's."""

import numpy as np
import pytest
import torch

from dsd_fast.metrics import (
    class_accuracy,
    class_iou,
    confusion_matrix,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
)

TRUTH = [[0, 0, 0, 1], [1, 1, 2, 2]]
PREDICTED = [[0, 0, 1, 1], [1, 0, 2, 0]]
COUNTS = [[2, 1, 0], [1, 2, 0], [1, 0, 1]]


def test_by_hand():
    found = confusion_matrix(TRUTH, PREDICTED, 3)
    assert found.dtype == np.int64
    assert found.tolist() == COUNTS
    # Of class 0, 2 pixels in both and 5 in either; and so on.
    assert class_iou(found) == pytest.approx([2 / 5, 2 / 4, 1 / 2])
    assert mean_iou(found) == pytest.approx((0.4 + 0.5 + 0.5) / 3)
    assert class_accuracy(found) == pytest.approx([2 / 3, 2 / 3, 1 / 2])
    assert mean_accuracy(found) == pytest.approx((2 / 3 + 2 / 3 + 1 / 2) / 3)
    assert pixel_accuracy(found) == pytest.approx(5 / 8)


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    # Of 7 classes the last two are absent, and class 4 is predicted but never true.
    truth = draw.integers(0, 4, (3, 16, 16)).astype(np.uint8)
    predicted = np.where(draw.random(truth.shape) < 0.6, truth, draw.integers(0, 5, truth.shape)).astype(np.uint8)
    found = confusion_matrix(torch.from_numpy(truth), predicted, 7)
    flat = truth.ravel(), predicted.ravel()
    assert found.tolist() == metrics.confusion_matrix(*flat, labels=range(7)).tolist()
    each = metrics.jaccard_score(*flat, average=None, labels=range(5))
    assert class_iou(found)[:5] == pytest.approx(each)
    assert each[4] == 0
    assert np.isnan(class_iou(found)[5:]).all()
    # Without labels it takes those that are true or predicted somewhere, as the mean here does.
    assert mean_iou(found) == pytest.approx(metrics.jaccard_score(*flat, average="macro"))
    assert pixel_accuracy(found) == pytest.approx(metrics.accuracy_score(*flat))
    assert mean_accuracy(found) == pytest.approx(
        metrics.recall_score(*flat, labels=range(4), average="macro", zero_division=0)
    )


def test_parts_add_up_and_many_matrices_are_one_array():
    parts = [confusion_matrix(*row, 3) for row in zip(TRUTH, PREDICTED, strict=True)]
    assert np.sum(parts, 0).tolist() == COUNTS
    assert mean_iou(np.stack(parts)).tolist() == [float(mean_iou(part)) for part in parts]
    # Weights leave shares as they are.
    assert float(mean_iou(0.25 * np.array(COUNTS))) == pytest.approx(float(mean_iou(COUNTS)))


def test_pixels_without_a_class_are_not_counted():
    found = confusion_matrix([0, 255, 1, 255], [0, 7, 0, 1], 2, ignore=255)
    assert found.tolist() == [[1, 0], [1, 0]]


def test_many_classes_in_small_integers():
    # 200 · 201 + 3 leaves uint8.
    found = confusion_matrix(np.array([200], np.uint8), np.array([3], np.uint8), 201)
    assert found[200, 3] == 1
    assert found.sum() == 1


def test_nothing_at_all_is_no_number():
    empty = confusion_matrix(np.zeros(0, int), np.zeros(0, int), 2)
    assert empty.tolist() == [[0, 0], [0, 0]]
    assert np.isnan([mean_iou(empty), mean_accuracy(empty), pixel_accuracy(empty)]).all()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: confusion_matrix([0, 1], [0], 2), "predicted"),
        (lambda: confusion_matrix([0, 2], [0, 1], 2), "truth"),
        (lambda: confusion_matrix([0, -1], [0, 1], 2), "truth"),
        (lambda: confusion_matrix([0, 1], [0, 2], 2), "predicted"),
        (lambda: confusion_matrix([0, 1], [0.0, 1.0], 2), "predicted"),
        (lambda: confusion_matrix([0], [0], 0), "classes"),
        (lambda: class_iou([[1, 2]]), "confusion"),
        (lambda: pixel_accuracy([[1, -2], [0, 0]]), "confusion"),
        (lambda: class_accuracy([[1, float("nan")], [0, 0]]), "confusion"),
    ],
)
def test_what_does_not_fit_is_named(call, names):
    with pytest.raises(ValueError, match=f"^{names}: got"):
        call()
