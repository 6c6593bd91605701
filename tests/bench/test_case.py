"""What cases and figures refuse."""

import math

import pytest

from dsd_fast.bench import Case, Context, Figure, Group, Quality, Side, Suite, Target, Work
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


def sided(*sides):
    return Work(sides, lambda a, b: 0.0, 0.0, "difference", "oracle", "item", 1)


def side(name, against=None, **rest):
    return Side(name, lambda: 1, 1, against=against, **rest)


def test_sides_are_a_ladder_unless_they_name_what_they_are_against():
    assert sided(side("a"), side("b"), side("c")).comparisons() == [(1, 0, ()), (2, 1, ())]
    target = Target("ratio", 2.0)
    found = sided(side("a", {}), side("b", {}), side("c", {"b": (target,), "a": ()})).comparisons()
    assert found == [(2, 1, (target,)), (2, 0, ())]


def test_a_side_cannot_be_against_what_is_not_there():
    with pytest.raises(ValueError, match=r"side 'b' is against \['c'\], expected others of \['a', 'b'\]"):
        sided(side("a"), side("b", {"c": ()}))
    with pytest.raises(ValueError, match=r"side 'b' is against \['b'\]"):
        sided(side("a"), side("b", {"b": ()}))
    with pytest.raises(ValueError, match="sides: none is measured against another"):
        sided(side("a", {}), side("b", {}))


def test_a_share_of_bandwidth_needs_bytes():
    against = {"a": (Target("copy_share", 0.5),)}
    with pytest.raises(ValueError, match="side 'b': a target of its copy share needs its bytes"):
        sided(side("a"), side("b", against))
    assert sided(side("a"), side("b", against, bytes=8)).comparisons()
