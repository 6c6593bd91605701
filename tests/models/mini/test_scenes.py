import numpy as np
import pytest

from dsd_fast.models.mini.digits import EVALUATION, TRAINING, digit
from dsd_fast.models.mini.scenes import COLOURS, EVAL_SEED, HELD_OUT, PAIRS, RELATIONS, SHAPES, scene


def _mentioned(caption):
    words = caption.split()
    return {(words[i], words[i + 1]) for i in range(len(words) - 1)} & set(PAIRS)


def _holds(caption, picture):
    """Whether a caption of the grammar is true, judged from masks and attributes alone."""
    relation = next((r for r in RELATIONS if f" {r} " in caption), None)
    phrases = [phrase.split() for phrase in (caption.split(f" {relation} ") if relation else [caption])]
    found = []
    for phrase in phrases:
        colour, shape, sizes = phrase[-2], phrase[-1], phrase[1:-2]
        match = [
            o for o in picture.objects if (o.colour, o.shape) == (colour, shape) and all(o.size == s for s in sizes)
        ]
        if not match:
            return False
        found.append(match[0])
    if relation is None:
        return True
    (ya, xa), (yb, xb) = (np.argwhere(item.mask).mean(0) for item in found)
    return {"left of": xa < xb, "right of": xa > xb, "above": ya < yb, "below": ya > yb}[relation]


def test_a_seed_always_draws_the_same_scene():
    for seed in (0, 7, EVAL_SEED + 3):
        first, again = scene(seed), scene(seed)
        assert np.array_equal(first.image, again.image)
        assert first.caption == again.caption
        assert first.negatives() == again.negatives()
        assert not np.array_equal(first.image, scene(seed + 1).image)


def test_image_masks_boxes_and_keypoints_agree():
    for seed in range(100):
        picture = scene(seed)
        assert picture.image.shape == (64, 64, 3)
        assert picture.image.dtype == np.uint8
        for item in picture.objects:
            assert item.mask.shape == (64, 64)
            assert item.mask.dtype == bool
            x0, y0, x1, y1 = item.box
            assert item.mask[y0:y1, x0:x1].sum() == item.mask.sum() > 0
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 64
            assert item.keypoints["top"][1] == pytest.approx(y0, abs=1.5)
            assert item.keypoints["bottom"][1] == pytest.approx(y1, abs=1.5)
            assert item.keypoints["left"][0] == pytest.approx(x0, abs=1.5)
            assert item.keypoints["right"][0] == pytest.approx(x1, abs=1.5)
            cx, cy = item.keypoints["centre"]
            assert item.mask[int(cy), int(cx)] == (item.shape != "ring")


def test_masks_show_the_named_colour():
    for seed in range(200):
        for item in scene(seed).objects:
            mean = scene(seed).image[item.mask].mean(0) / 255
            nearest = min(COLOURS, key=lambda name: np.linalg.norm(mean - 0.9 * np.asarray(COLOURS[name])))
            assert nearest == item.colour, seed


def test_captions_are_true_and_negatives_false_by_the_masks():
    for held_out in (False, True, None):
        for seed in range(EVAL_SEED, EVAL_SEED + 400):
            picture = scene(seed, held_out=held_out)
            assert _holds(picture.caption, picture), picture.caption
            negatives = picture.negatives()
            expected = {"colour", "shape"} | ({"swap", "relation"} if len(picture.objects) == 2 else set())
            assert set(negatives) == expected
            for caption in negatives.values():
                assert not _holds(caption, picture), (picture.caption, caption)


def test_two_objects_do_not_overlap_and_only_one_relation_describes_them():
    for seed in range(400):
        first, second = scene(seed, objects=2).objects
        assert not (first.mask & second.mask).any()
        assert first.colour != second.colour
        assert first.shape != second.shape
        (xa, ya), (xb, yb) = first.keypoints["centre"], second.keypoints["centre"]
        along, across = abs(xa - xb), abs(ya - yb)
        if scene(seed, objects=2).relation in ("above", "below"):
            along, across = across, along
        assert across <= 0.6 * along + 1e-6


def test_training_scenes_never_contain_held_out_pairs():
    for seed in range(2000):
        picture = scene(seed)
        for caption in (picture.caption, *picture.negatives().values()):
            assert not _mentioned(caption) & HELD_OUT, caption
    drawn = {(o.colour, o.shape) for seed in range(1000) for o in scene(seed).objects}
    assert drawn == set(PAIRS) - HELD_OUT


def test_held_out_scenes_have_exactly_one_held_out_pair():
    drawn = set()
    for seed in range(300):
        pairs = [(o.colour, o.shape) for o in scene(seed, held_out=True).objects]
        assert sum(pair in HELD_OUT for pair in pairs) == 1
        drawn |= set(pairs) & HELD_OUT
    assert drawn == HELD_OUT
    assert {(o.colour, o.shape) for seed in range(1000) for o in scene(seed, held_out=None).objects} == set(PAIRS)


def test_number_of_objects():
    assert all(len(scene(seed, objects=count).objects) == count for seed in range(50) for count in (1, 2))
    assert {len(scene(seed).objects) for seed in range(50)} == {1, 2}
    assert {o.shape for seed in range(200) for o in scene(seed).objects} == set(SHAPES)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="seed"):
        scene(-1)
    with pytest.raises(ValueError, match="objects"):
        scene(0, objects=3)


def test_digits():
    pytest.importorskip("sklearn")
    assert len(EVALUATION) == 360
    assert not set(TRAINING) & set(EVALUATION)
    drawn = digit(3, seed=1)
    assert drawn.caption == "a photo of the digit three"
    assert drawn.label == 3
    assert drawn.image.shape == (64, 64, 3)
    assert np.array_equal(drawn.image, digit(3, seed=1).image)
    assert not np.array_equal(drawn.image, digit(3, seed=2).image)
    with pytest.raises(IndexError, match="index"):
        digit(EVALUATION.stop)
