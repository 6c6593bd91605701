"""Groups: what is one, what is refused, and the questions in it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from dsd_fast.matching import Group

A, B, C = Path("a.png"), Path("b.png"), Path("c.png")


def test_a_group_holds_what_it_is_given():
    sources = (A, Image.new("RGB", (2, 2)), np.zeros((2, 2, 3), np.uint8), torch.zeros(3, 2, 2))
    group = Group(sources, ("a dog",), 3, "animals", "7")
    assert all(kept is given for kept, given in zip(group.images, sources, strict=True))
    assert (group.texts, group.label, group.category, group.id) == (("a dog",), 3, "animals", "7")
    assert not group.paired
    assert group.num_candidates == 4
    assert dsd.Group is Group
    # Lists become tuples, numbers of NumPy whole numbers; equal groups are equal and can be counted.
    assert Group([A], ["x", "y"], np.int64(1)) == Group((A,), ("x", "y"), 1)
    assert type(Group([A], ["x", "y"], np.int64(1)).label) is int
    assert len({Group([A], ["x", "y"]), Group((A,), ("x", "y"))}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((A,), ("x",)), "images, texts: got 1 and 1, expected 1 image with 2 texts or more"),
        (((), ("x", "y")), "images, texts: got 0 and 2"),
        (((A, B), ()), "images, texts: got 2 and 0"),
        (((A, B), ("x", "y", "z")), "images, texts: got 2 and 3"),
        (((A,), ("x", "y"), 2), "label: got 2, expected 0 to 1"),
        (((A,), ("x", "y"), -1), "label: got -1, expected 0 to 1"),
        (((A, B, C), ("x",), 3), "label: got 3, expected 0 to 2"),
        (((A, B), ("x", "y"), 1), "label: got 1, expected 0 where text i belongs to image i"),
        (((A,), ("x", "y"), True), "label: got bool True, expected an int"),
        (((A,), ("x", "y"), 1.0), "label: got float 1.0, expected an int"),
        (((A,), ("x", "y"), "1"), "label: got str '1', expected an int"),
        ((("a.png",), ("x", "y")), r"images\[0\]: got the str 'a.png'; use pathlib.Path"),
        (((A, 3), ("x",)), r"images\[1\]: got int 3, expected a pathlib.Path"),
        ((A, ("x", "y")), "images: got a PosixPath, expected a tuple"),
        (((A,), "xy"), "texts: got str 'xy', expected a tuple"),
        (((A,), ("x", None)), r"texts\[1\]: got None, expected a str"),
        (((A,), ("x", b"y")), r"texts\[1\]: got a bytes, expected a str"),
        (((A,), ("x", "y"), 0, None), "category: got None, expected a str"),
        (((A,), ("x", "y"), 0, "", 7), "id: got int 7, expected a str"),
    ],
)
def test_what_is_no_group_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Group(*arguments)


def test_groups_from_tuples_as_one_writes_them():
    group = Group((A,), ("x", "y"), 1)
    assert Group.of(group) is group
    assert Group.of((A, ["x", "y"], 1)) == group
    assert Group.of([(A,), ("x", "y"), 1]) == group
    assert Group.of(([A, B], "x", 1)) == Group((A, B), ("x",), 1)
    assert Group.of(([A, B], ["x", "y"], 0)).paired


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((A, ["x", "y"]), "example: got 2 values, expected 3: a Group"),
        ("a.png", "example: got str 'a.png', expected a Group"),
        ({"image": A}, "example: got a dict, expected a Group"),
        ((A, "x", 0), "images, texts: got 1 and 1"),
        (("a.png", ["x", "y"], 0), "use pathlib.Path"),
    ],
)
def test_other_examples_are_refused(example, message):
    with pytest.raises(ValueError, match=message):
        Group.of(example)


def test_the_questions_of_a_group():
    single = Group((A,), ("x", "y"), 1, id="s")
    assert single.queries() == [single]
    paired = Group((A, B, C), ("x", "y", "z"), category="both", id="p")
    assert paired.paired
    assert paired.num_candidates == 3
    assert paired.queries() == [
        Group((A,), ("x", "y", "z"), 0, "both", "p/image0"),
        Group((B,), ("x", "y", "z"), 1, "both", "p/image1"),
        Group((C,), ("x", "y", "z"), 2, "both", "p/image2"),
        Group((A, B, C), ("x",), 0, "both", "p/text0"),
        Group((A, B, C), ("y",), 1, "both", "p/text1"),
        Group((A, B, C), ("z",), 2, "both", "p/text2"),
    ]
    assert {query.id for query in Group((A, B), ("x", "y")).queries()} == {""}
