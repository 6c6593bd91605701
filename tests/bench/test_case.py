"""What cases and figures refuse."""

import math

import pytest

from dsd_fast.bench import Case, Context, Figure, Group, Quality, Side, Suite, Work
from dsd_fast.metrics import wilson


def test_shared_things_are_made_once():
    context, made = Context(), []
    assert [context.shared("a", lambda: made.append(1) or len(made)) for _ in range(3)] == [1, 1, 1]
    assert context.shared("b", lambda: None) is None
    assert made == [1]


def test_share_has_the_wilson_interval():
    figure = Figure.share("share", 80, 100, chance=0.5, floor=0.7)
    assert (figure.value, figure.n, figure.chance, figure.floor) == (0.8, 100, 0.5, 0.7)
    assert (figure.low, figure.high) == wilson(80, 100)
    assert Figure.share("all", 10, 10).high == 1.0
    with pytest.raises(ValueError, match="figure 'share': got n = 0"):
        Figure.share("share", 0, 0)
    with pytest.raises(ValueError, match="right: got 3"):
        Figure.share("share", 3, 2)


@pytest.mark.parametrize(("value", "floor", "passes"), [(0.5, None, True), (0.5, 0.5, True), (0.5, 0.51, False)])
def test_a_figure_passes_from_its_floor_on(value, floor, passes):
    assert Figure("f", value, 0.4, 0.6, 10, floor=floor).passes is passes


def test_a_figure_outside_of_its_interval_is_refused():
    with pytest.raises(ValueError, match=r"figure 'f': got 0\.7, which is outside of its interval 0\.4 to 0\.6"):
        Figure("f", 0.7, 0.4, 0.6, 10)
    with pytest.raises(ValueError, match="figure 'f': got nan"):
        Figure("f", math.nan, 0.4, 0.6, 10)


def test_work_needs_two_sides_with_names_that_differ():
    def work(*names):
        sides = [Side(name, lambda: 1, 1) for name in names]
        return Work(sides, lambda a, b: 0.0, 0.0, "difference", "oracle", "item", 1)

    assert len(work("a", "b").sides) == 2
    with pytest.raises(ValueError, match="sides: got 1, expected a baseline and at least one more"):
        work("a")
    with pytest.raises(ValueError, match=r"sides: got \['a', 'a'\], expected names that differ"):
        work("a", "a")


def test_a_suite_knows_its_cases_and_groups():
    cases = [Case("a", "g", lambda _: None), Quality("b", "g", lambda _: [])]
    suite = Suite("s", [Group("g", "G")], cases)
    assert [suite.place(name) for name in ("a", "b", "c")] == [0, 1, -1]
    with pytest.raises(ValueError, match="suite 's': cases of one name: a"):
        Suite("s", [Group("g", "G")], [cases[0], cases[0]])
    with pytest.raises(ValueError, match="suite 's': case 'a' is in no group of it, 'g'"):
        Suite("s", [], cases)
