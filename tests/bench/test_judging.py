"""What a judge takes for right."""

import math

import pytest
import torch

from dsd_fast.bench.suites.judging import Judge

TRUTH = torch.tensor([1.0, -4.0], dtype=torch.float64)


def test_the_limit_is_twice_plain_torchs_error_and_a_rounding():
    plain = (TRUTH + 0.001).bfloat16()
    error = float((plain.double() - TRUTH).abs().max())
    limit = 2 * error + 2.0**-7 * 4.0
    judge = Judge([TRUTH], [plain])
    assert judge([TRUTH + limit], judge.truth) == pytest.approx(1.0)
    assert judge([TRUTH - limit / 2], judge.truth) == pytest.approx(0.5)
    # The type may be another than that of the tensors, which a sum may have widened.
    assert Judge([TRUTH], [plain.double()], [torch.bfloat16]).limits == judge.limits


def test_the_worst_of_several_counts_and_what_a_side_lacks_does_not():
    judge = Judge([TRUTH, TRUTH], [TRUTH.float(), TRUTH.float()])
    limit = 2.0**-23 * 4.0
    assert judge([TRUTH, TRUTH + 3 * limit], judge.truth) == pytest.approx(3.0)
    assert judge([TRUTH, None], judge.truth) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_never_right(bad):
    judge = Judge([TRUTH, TRUTH], [TRUTH.float(), TRUTH.float()])
    assert not judge([torch.tensor([bad, 1.0]), TRUTH], judge.truth) <= 1
    assert not judge([TRUTH, torch.tensor([bad, 1.0])], judge.truth) <= 1


def test_a_tensor_of_zeros_has_no_room_for_errors():
    judge = Judge([torch.zeros(2)], [torch.zeros(2)])
    assert judge([torch.zeros(2)], judge.truth) == 0.0
    assert judge([torch.full((2,), 1e-30)], judge.truth) > 1
    assert Judge([torch.zeros(0)], [torch.zeros(0)])([torch.zeros(0)], [torch.zeros(0)]) == 0.0
