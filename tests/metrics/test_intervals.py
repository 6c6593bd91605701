import pytest

from dsd_fast.metrics import wilson


def test_wilson_interval():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))
    assert wilson(10, 10)[1] == 1.0


@pytest.mark.parametrize(("right", "n"), [(-1, 10), (11, 10), (1, 0)])
def test_wilson_refuses_what_is_no_proportion(right, n):
    with pytest.raises(ValueError, match=f"right: got {right}, expected between 0 and n = {n}"):
        wilson(right, n)
