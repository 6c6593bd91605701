import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import dsd_fast as dsd
from benchmarks.suites import class_tokens, zsl
from benchmarks.suites import guide as guides
from benchmarks.suites.guide import ATTRIBUTES, Attribute
from benchmarks.suites.intervals import over_runs
from benchmarks.suites.mini_card import judge
from benchmarks.suites.mini_card.judge import Seen
from dsd_fast.bench.case import Context
from dsd_fast.models.mini.scenes import EVAL_SEED, HELD_OUT, PAIRS, scene


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(scope="module")
def networks():
    """An untrained judge and an untrained guide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return judge._Judge().eval(), guides._Guide().eval()


def test_an_attribute_has_the_probabilities_of_all_combinations(networks):
    pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    _, network = networks
    with torch.no_grad():
        joint = Attribute(network, "colour", "size")(pixels).softmax(-1)
        colour, _, size = (
            part.softmax(-1) for part in network(pixels).split([len(v) for v in ATTRIBUTES.values()], -1)
        )
    wanted = torch.stack([colour[:, c] * size[:, s] for c in range(6) for s in range(2)], -1)
    torch.testing.assert_close(joint, wanted)
    labels = [f"{c} {s}" for c, s in itertools.product(ATTRIBUTES["colour"], ATTRIBUTES["size"])]
    assert Attribute(network, "colour", "size").labels == labels


def test_the_guide_learns_the_answers_of_its_pictures():
    image, answers = guides._example(7)
    (item,) = scene(guides.FIRST_SEED + 7, objects=1, held_out=None).objects
    named = [values[answer] for values, answer in zip(ATTRIBUTES.values(), answers, strict=True)]
    assert named == [item.colour, item.shape, item.size]
    assert image.shape == (64, 64, 3)


def test_a_picture_shows_its_class_by_one_object_alone():
    asked = {"colour": "red", "shape": "ring"}
    assert class_tokens.shows(Seen({"red": ("ring", "small")}, {}, None), asked)
    assert not class_tokens.shows(Seen({"red": ("ring", "small")}, {}, None), {**asked, "size": "large"})
    assert not class_tokens.shows(Seen({"blue": ("ring", "small")}, {}, None), asked)
    assert not class_tokens.shows(Seen({"red": ("ring", "small"), "blue": ("ring", "small")}, {}, None), asked)
    assert not class_tokens.shows(Seen({}, {}, None), asked)


def test_tasks_have_the_prompts_and_what_is_right(model, networks):
    context = _context(*networks)
    shapes = class_tokens._Bench(class_tokens.NO_WORD["shapes"], context, 7, 1)
    assert shapes.texts("{}")[4] == "a red ring"
    assert shapes.texts("<{}>")[4] == "a red <ring>"
    assert shapes.task.classes["ring"] == {"shape": "ring", "colour": "red"}
    # Of each of five classes as many pictures, and seven at least.
    assert shapes.each == 2
    circles = class_tokens._Bench(class_tokens.AMBIGUOUS, context, 1, 1)
    large_red = list(circles.task.classes).index("large red")
    assert [circles.texts(said)[large_red] for said in ("{}", "<{}>", "")] == [
        "a large red circle",
        "a <large-red> circle",
        "a circle",
    ]
    words = circles.task.initial(model)
    assert "large" not in words
    assert {"small", "red", "ed", "circles"}.isdisjoint(words)
    assert {"above", "photo"} < set(words)
    assert circles.guide.labels[circles.outputs[large_red]] == "red circle large"


def test_figures_are_the_shares_of_the_pictures(monkeypatch, networks):
    monkeypatch.setattr(class_tokens, "CLAMPS", (None, 1.5))
    monkeypatch.setattr(class_tokens.Task, "initial", lambda task, model: ("photo", "large"))
    monkeypatch.setattr(class_tokens, "SEVERAL", {"compared": 1, "updates": 1})
    config = class_tokens.replace(class_tokens.CONFIG, images=1, updates=1, steps=2, keep="last")
    task = class_tokens.NO_WORD["colours"]
    context = _context(*networks)
    figures = {each.name: each for each in class_tokens.no_word("s", task, context, n=6, runs=1, config=config)}
    bench = class_tokens._Bench(task, context, 6, 1)
    right = bench.pictures([bench.model], bench.texts("{}"))
    assert right.shape == (1, 6, 2)
    assert [figures[f"s, the word itself: {by}"].value for by in ("judge", "guide")] == right[0].mean(0).tolist()
    # One step of this rate leaves the clamp of 1.5 far behind.
    assert 's, token, clamp 1.5, from "a" alone: judge' in figures
    assert figures["s, token, clamp 1.5: held by the clamp"].value == 1
    assert {each.n for each in figures.values()} == {6}


def test_a_run_of_zero_shot_learning_has_all_classes(tmp_path):
    zsl._draw(tmp_path, EVAL_SEED, 2, 1)
    names = {f"{colour} {shape}" for colour, shape in PAIRS}
    seen = names - set(zsl.UNSEEN)
    assert {folder.name for folder in (tmp_path / "train").iterdir()} == seen
    assert {folder.name for folder in (tmp_path / "test").iterdir()} == names
    assert set(zsl.VALIDATION) < seen
    assert {f"{colour} {shape}" for colour, shape in HELD_OUT} < set(zsl.UNSEEN)
    assert all(len(list(folder.iterdir())) == 2 for folder in (tmp_path / "train").iterdir())
    files = sorted(tmp_path.rglob("*.png"))
    assert len({file.name for file in files}) == len(files) == 2 * len(seen) + len(names)
    (item,) = scene(int(files[0].stem), objects=1, held_out=None).objects
    assert files[0].parent.name == f"{item.colour} {item.shape}"
    assert np.array_equal(np.asarray(Image.open(files[0])), scene(int(files[0].stem), objects=1, held_out=None).image)


def test_the_misreading_generator_alone_takes_all_colours_for_one(model):
    other = zsl._misreading(model)
    states = [each.encode_prompts(["a red ring", "a green ring", "a a ring"]).states for each in (other, model)]
    assert torch.equal(states[0][0], states[0][1])
    assert torch.equal(states[0][0], states[1][2])
    assert not torch.equal(states[1][0], states[1][1])
    assert other.clip is model.clip


def test_intervals_over_runs_have_both_kinds_of_chance():
    value, low, high = over_runs([0.5, 0.5, 0.5], [(0.4, 0.6)] * 3)
    # The mean of three has a deviation of 0.1 / 1.96 / √3; a thousand draws know its quantiles to a tenth.
    assert value == 0.5
    assert high - low == pytest.approx(0.2 / 3**0.5, rel=0.15)
    value, low, high = over_runs([0.2, 0.5, 0.8], [(v, v) for v in (0.2, 0.5, 0.8)])
    assert (low, high) == pytest.approx((0.2, 0.8))


def _context(judging, guiding):
    context = Context()
    context.shared("judge", lambda: judging)
    context.shared("guide", lambda: guiding)
    return context
