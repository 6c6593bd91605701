"""PCK, by hand: distances of 3, 4 and 5 pixels against thresholds that they meet exactly."""

import numpy as np
import pytest
import torch

from dsd_fast.metrics import box_extents, correct_keypoints, pck

TRUTH = np.array([[[10, 10], [20, 10], [30, 30]], [[5, 5], [40, 8], [50, 50]]], float)
# Off by (3, 4), (0, 4), nothing; and by (6, 8), (5, 0), (-3, -4): distances 5, 4, 0 and 10, 5, 5.
PREDICTED = TRUTH + np.array([[[3, 4], [0, 4], [0, 0]], [[6, 8], [5, 0], [-3, -4]]], float)


@pytest.mark.parametrize(
    ("extents", "alpha", "right"),
    [
        # max(h, w) is 50, then 40, of the two images: thresholds 5 and 4.
        ([[50, 20], [10, 40]], 0.1, [[1, 1, 1], [0, 0, 0]]),
        ([[50, 20], [10, 50]], 0.1, [[1, 1, 1], [0, 1, 1]]),
        ([64, 48], 0.15625, [[1, 1, 1], [1, 1, 1]]),
        ([64, 48], 0.0625, [[0, 1, 1], [0, 0, 0]]),
    ],
)
def test_a_keypoint_is_correct_up_to_the_threshold(extents, alpha, right):
    found = correct_keypoints(PREDICTED, TRUTH, extents, alpha)
    assert found.dtype == bool
    assert found.tolist() == np.array(right, bool).tolist()
    tensors = (torch.from_numpy(PREDICTED), torch.from_numpy(TRUTH), torch.tensor(extents))
    assert correct_keypoints(*tensors, alpha).tolist() == found.tolist()


def test_one_image_needs_no_leading_axis_and_a_nan_is_wrong():
    predicted = PREDICTED[0].copy()
    predicted[2, 1] = np.nan
    assert correct_keypoints(predicted, TRUTH[0], [50, 20]).tolist() == [True, True, False]


def test_images_and_points_are_averaged_apart():
    right = [[1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]]
    # Of images 3/4, 1/4 and 1; of points 8 of 12.
    assert pck(right) == pytest.approx((2 / 3, 2 / 3))
    # The first image keeps one point, right; the second three, one right; the third none.
    seen = [[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]]
    found = pck(right, seen)
    assert (found.image, found.point) == pytest.approx(((1 + 1 / 3) / 2, 2 / 4))


def test_extents_are_height_and_width():
    assert box_extents([[2, 3, 10, 30], [0, 0, 5, 4]]).tolist() == [[27, 8], [4, 5]]


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: correct_keypoints(PREDICTED[:1], TRUTH, [64, 64]), "predicted"),
        (lambda: correct_keypoints(PREDICTED[..., :1], TRUTH[..., :1], [64, 64]), "truth"),
        (lambda: correct_keypoints(PREDICTED, TRUTH, [[64, 64]]), "extents"),
        (lambda: correct_keypoints(PREDICTED, TRUTH, [64, 0]), "extents"),
        (lambda: correct_keypoints(PREDICTED, TRUTH, [64, 64], 0), "alpha"),
        (lambda: correct_keypoints(PREDICTED, TRUTH, [64, 64], float("nan")), "alpha"),
        (lambda: box_extents([1, 2, 3]), "boxes"),
        (lambda: box_extents([4, 2, 4, 9]), "boxes"),
        (lambda: pck([1, 0]), "correct"),
        (lambda: pck([[1, 0]], [[1, 0, 1]]), "visible"),
        (lambda: pck([[1, 0]], [[0, 0]]), "visible"),
        (lambda: pck(np.zeros((0, 5))), "visible"),
    ],
)
def test_what_does_not_fit_is_named(call, names):
    with pytest.raises(ValueError, match=f"^{names}: got"):
        call()
