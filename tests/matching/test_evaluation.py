"""Evaluation: scores that are the matcher's, each computed once, and figures counted by hand."""

import math
from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.matching import Group, evaluation
from dsd_fast.matching.evaluation import Evaluation, evaluate_iter
from dsd_fast.matching.group_results import judge
from dsd_fast.matching.group_scores import Failure, GroupScores
from dsd_fast.metrics import wilson
from dsd_fast.reference import matching as reference
from tests.images.files import refilled
from tests.matching.test_matcher import CAPTIONS, TIMES, Counted, matcher, pictures
from tests.tiny import tiny_pipeline

# Most tests look at no interval.
evaluate = partial(evaluation.evaluate, resamples=5)


@pytest.fixture(scope="module")
def sd15():
    return tiny_pipeline("sd15")


@pytest.fixture(scope="module")
def groups():
    """All three kinds, which share images and texts."""
    images = pictures(4)
    return [
        Group((images[0],), CAPTIONS, 2, "texts", "a"),
        Group((images[3],), CAPTIONS[:2], 0, "texts", "b"),
        Group((images[2], images[0], images[1]), CAPTIONS[1:2], 1, "images", "c"),
        Group(images[:2], CAPTIONS[:2], 0, "pairs", "d"),
        Group((images[0],), CAPTIONS[::-1], 0, "texts", "e"),
    ]


def by_hand(table, group):
    """The scores of all images and texts of a group, (images, texts), out of all of them."""
    rows = [next(n for n, image in enumerate(pictures(4)) if np.array_equal(image, own)) for own in group.images]
    return table[rows][:, [CAPTIONS.index(text) for text in group.texts]].numpy()


@pytest.mark.parametrize("settings", [{}, {"official": True}, {"noise_weight": 0}, {"attention_weight": 0}], ids=str)
def test_scores_are_the_matchers(sd15, groups, settings):
    m = matcher(sd15, **settings)
    found, table = evaluate(m, groups, parts=True), m.score(pictures(4), CAPTIONS)
    for group, result in zip(groups, found.results, strict=True):
        want = by_hand(table, group)
        assert (result.id, result.category, result.failure) == (group.id, group.category, None)
        assert result.scores.dtype == np.float32
        np.testing.assert_allclose(result.scores, want if group.paired else want.flatten(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(sum(part.scores for part in result.parts.values()), result.scores, rtol=0, atol=1e-5)
        if group.paired:
            text = [want[0, 0] > want[0, 1], want[1, 1] > want[1, 0]]
            image = [want[0, 0] > want[1, 0], want[1, 1] > want[0, 1]]
            assert result.paired == {"text": all(text), "image": all(image), "group": all(text + image)}
            assert result.rank is None
        else:
            order = np.argsort(-want.flatten())
            assert result.rank == 1 + order.tolist().index(group.label)
            assert result.paired is None
    parts = {"noise_weight": ["attention"], "attention_weight": ["noise"]}.get(
        *settings or [""], ["attention", "noise"]
    )
    assert list(found.parts) == parts
    assert evaluate(m, groups[:1]).parts == {}


def test_buffers_of_groups_may_be_filled_again(sd15):
    pair, third = pictures(3)[:2], pictures(3)[2]
    shown = [*pair, third, pair[0]]
    drawn = (
        Group((each,), CAPTIONS[:2]) if n % 2 else (each, CAPTIONS, 0)
        for n, each in enumerate(refilled("array", shown))
    )
    want = matcher(sd15).score(shown, CAPTIONS).numpy()
    results = evaluate(matcher(sd15), drawn).results
    for number, result in enumerate(results):
        np.testing.assert_allclose(result.scores, want[number, : 2 if number % 2 else 4], rtol=0, atol=1e-5)
    # The last has the first one's image again, and no other one has.
    clusters = [result.cluster for result in results]
    assert clusters.index(clusters[3]) == 0
    assert len(set(clusters)) == 3


def test_parts_are_the_two_terms_alone(sd15, groups):
    found = evaluate(matcher(sd15), groups, parts=True)
    for part, settings in {"attention": {"noise_weight": 0}, "noise": {"attention_weight": 0}}.items():
        alone = evaluate(matcher(sd15, **settings), groups)
        for mine, other in zip(found.parts[part].results, alone.results, strict=True):
            np.testing.assert_allclose(mine.scores, other.scores, rtol=0, atol=1e-5)
            assert (mine.rank, mine.paired) == (other.rank, other.paired)
        assert found.parts[part].figures.keys() == alone.figures.keys()


def test_each_thing_is_computed_once(sd15, groups):
    pairs = {(id(image), text) for group in groups for image in group.images for text in group.texts}
    steps = len(TIMES)
    with Counted(sd15) as seen:
        evaluate(matcher(sd15), groups, parts=True)
    # 17 pairs asked for, of which 9 differ, of 4 images.
    assert sum(len(group.images) * len(group.texts) for group in groups) == 17
    assert len(pairs) == 9
    assert seen == {
        "shared": 4 * steps,
        "text-dependent": (9 + 4) * steps,
        "unet out": (9 + 4) * steps,
        "keys": len(CAPTIONS) + 1,
        "vae": 4,
        "text encoder": len(CAPTIONS) + 1,
    }


def test_it_costs_what_predict_costs(sd15):
    images = pictures(12)
    groups = [Group((image,), [f"{caption} {n % 5}" for caption in CAPTIONS]) for n, image in enumerate(images)]
    with Counted(sd15) as want:
        scores = matcher(sd15).predict([(group.images[0], text) for group in groups for text in group.texts])
    with Counted(sd15) as seen:
        found = evaluate(matcher(sd15), groups)
    assert seen == want
    np.testing.assert_allclose(np.concatenate([r.scores for r in found.results]), scores.numpy(), rtol=0, atol=1e-5)


def test_texts_that_do_not_fit_together_and_tuples(sd15, groups, monkeypatch):
    want = evaluate(matcher(sd15), groups)
    # The tiny text encoder's states of one text: every group is a run of its own.
    monkeypatch.setattr("dsd_fast.matching.group_scores._TEXT_BYTES", 4 * 77 * 24)
    written = [(list(g.images), list(g.texts), g.label) for g in groups]
    written[0] = (groups[0].images[0], list(groups[0].texts), 2)
    with Counted(sd15) as seen:
        found = evaluate(matcher(sd15), written)
    assert seen["vae"] == sum(len(group.images) for group in groups)
    for mine, other in zip(found.results, want.results, strict=True):
        np.testing.assert_allclose(mine.scores, other.scores, rtol=0, atol=1e-5)


def test_what_cannot_be_used_is_a_failure_and_the_others_go_on(sd15, groups, tmp_path):
    (tmp_path / "text.png").write_text("dear diary")
    broken = [
        Group((tmp_path / "missing.png",), CAPTIONS, 0, "texts"),
        groups[0],
        Group((groups[0].images[0], tmp_path / "text.png"), CAPTIONS[:1], 0, "images"),
        Group(groups[0].images, ("a cat", "dog " * 80), 0, "texts"),
        *groups[1:],
    ]
    m = matcher(sd15)
    # One image a time, so that failures stand in calls of their own, and then together with others.
    for at_once in (1, 100):
        m._scorer.images_at_once = at_once
        found = evaluate(m, broken, parts=True)
        reasons = {r.index: r.failure.reason for r in found.results if r.failure}
        assert reasons == {0: "missing", 2: "unsupported-format", 3: "text-too-long"}
        assert "missing.png does not exist" in found.results[0].failure.message
        assert found.results[3].failure.message.startswith("text 'dog dog dog")
        assert "has 82 tokens, expected at most 77" in found.results[3].failure.message
        assert found.counts == {"groups": 8, "scored": 5, "errors": 3, "not_finite": 0}
        assert found.results[0].scores is None
        assert found.results[0].parts["noise"].failure is found.results[0].failure
        want = evaluate(m, groups)
        assert [r.rank for r in found.results if not r.failure] == [r.rank for r in want.results]
        assert found.figures["accuracy"] == want.figures["accuracy"]
        assert found.figures["accuracy"].n == 4
    nothing = evaluate(m, broken[:1])
    assert (nothing.figures, nothing.counts["errors"]) == ({}, 1)
    (halved,) = evaluate(m, [Group(groups[0].images, ("a cat", "dog \udcff"), 0)]).results
    assert halved.failure.reason == "text-no-text"
    assert evaluate(m, []).figures == {}


def test_results_come_as_they_are_ready(sd15):
    taken = []

    class Image:
        def __fspath__(self):
            taken.append(1)
            return "missing.png"

    m = matcher(sd15)
    m._scorer.images_at_once = 1
    many = [Group((pictures(1)[0],), CAPTIONS[:2]) for _ in range(40)]
    results = evaluate_iter(m, many)
    with Counted(sd15) as seen:
        next(results)
    assert seen["vae"] == 1


def synthetic(scores, *, texts=True, **settings):
    """Groups, and as what is found for them given scores, (n, K)."""
    image = pictures(1)[0]
    groups, found = [], []
    for row in np.asarray(scores, float):
        shape = (1, len(row)) if texts else (len(row), 1)
        groups.append(Group((np.array(image),) * shape[0], tuple(f"text {i}" for i in range(shape[1])), **settings))
        found.append(GroupScores(row.reshape(shape), np.zeros(shape)))
    return groups, found


def test_figures_by_hand():
    rows = [[6, 5, 4, 3, 2, 1], [5, 6, 4, 3, 2, 1], [1, 6, 5, 4, 3, 2], [6, 6, 1, 1, 1, 1]]
    groups, found = synthetic(rows)
    groups[3] = Group(groups[3].images, groups[3].texts, 0, "tied")
    result = Evaluation.of(judge(groups, found))
    assert [r.rank for r in result.results] == [1, 2, 6, 2]
    assert list(result.figures) == ["accuracy", "R@1", "R@5", "mean_reciprocal_rank", "median_rank"]
    values = {name: figure.value for name, figure in result.figures.items()}
    assert values == {
        "accuracy": 1 / 4,
        "R@1": 1 / 4,
        "R@5": 3 / 4,
        "median_rank": 2,
        "mean_reciprocal_rank": (1 + 1 / 2 + 1 / 6 + 1 / 2) / 4,
    }
    assert all(figure.n == 4 for figure in result.figures.values())
    assert all(f.bootstrap[0] <= f.value <= f.bootstrap[1] for f in result.figures.values())
    assert result.figures["R@5"].wilson == wilson(3, 4)
    assert result.figures["R@5"].chance == 5 / 6
    assert result.figures["accuracy"].chance == pytest.approx(1 / 6)
    assert result.figures["median_rank"].wilson is None
    assert {name: figures["accuracy"].value for name, figures in result.by_category.items()} == {"": 1 / 3, "tied": 0}
    assert {name: figures["accuracy"].n for name, figures in result.by_category.items()} == {"": 3, "tied": 1}
    right = Evaluation.of(judge(groups, found, ties="right"))
    assert right.figures["accuracy"].value == 2 / 4
    # At most five candidates are all among the best five.
    mixed = [first + second for first, second in zip(synthetic(rows[:1]), synthetic([[1, 2]]), strict=True)]
    assert Evaluation.of(judge(*mixed)).figures["R@5"].chance == (5 / 6 + 1) / 2
    two = Evaluation.of(judge(*synthetic([[1, 2], [2, 1]])))
    assert "R@5" not in two.figures
    assert two.figures["accuracy"].chance == 1 / 2
    assert two.by_category == {}


def test_scores_that_are_no_numbers_are_wrong_and_counted():
    nan = math.nan
    result = Evaluation.of(judge(*synthetic([[nan, 0], [1, nan], [1, 0]])))
    assert [r.rank for r in result.results] == [2, 2, 1]
    assert result.figures["accuracy"].value == 1 / 3
    assert result.counts == {"groups": 3, "scored": 3, "errors": 0, "not_finite": 2}
    paired = [Group(pictures(2), ("a", "b"))]
    scores = [GroupScores(np.array([[2.0, 1], [nan, 2]]), np.zeros((2, 2)))]
    assert next(judge(paired, scores)).paired == {"text": False, "image": False, "group": False}


def test_questions_about_one_image_are_drawn_together():
    draw = np.random.default_rng(0)
    # 40 images with 10 questions each, of which all are right or none: 40 pieces of evidence.
    right = np.repeat(draw.random(40) < 0.5, 10)
    groups, found = synthetic(np.stack([right, ~right], 1))
    alone = Evaluation.of(judge(groups, found)).figures["accuracy"]
    shared = [Group(groups[n // 10].images, group.texts) for n, group in enumerate(groups)]
    together = Evaluation.of(judge(shared, found)).figures["accuracy"]
    widths = [figure.bootstrap[1] - figure.bootstrap[0] for figure in (alone, together)]
    # √10 times as wide; quantiles of 1,000 resamples are known to about 5 %.
    assert widths[1] / widths[0] == pytest.approx(math.sqrt(10), rel=0.2)
    assert alone.wilson == together.wilson
    # Of several images it is the right one that makes questions one piece of evidence; of pairs the first.
    first, second = pictures(2)
    several = [Group((first, second), ("a",), label) for label in (0, 1, 1)] + [Group((first, second), ("a", "b"))]
    ones = [np.zeros((len(group.images), len(group.texts))) for group in several]
    keys = [result.cluster for result in judge(several, [GroupScores(one, one) for one in ones])]
    assert keys == [id(first), id(second), id(second), id(first)]


def test_the_batch_mean_is_the_references():
    """Three questions a batch, the official score, on the mini model: texts for an image, and images for a text."""
    model = dsd.load("mini")
    pipe, images, steps = model.to_pipeline(), pictures(6), [300, 700]
    texts = ["a red circle", "a blue square", "a small green cross"]
    m = dsd.Matcher(model, dsd.MatchConfig(timesteps=steps, official=True))
    # The norms are about √(4·16·16) = 32, and float32 networks that sum in other orders differ by about 1e-6 of them.
    close = {"rtol": 0, "atol": 1e-4}
    by_image = [Group((image,), texts) for image in images[:3]]
    want = reference.score(pipe, images[:3], texts, timesteps=steps, batch_mean=True).numpy()
    found = evaluate(m, by_image, batch_mean=3)
    np.testing.assert_allclose([r.scores for r in found.results], want, **close)
    # Alone each has another score.
    assert np.abs(want - m.score(images[:3], texts).numpy()).max() > 1e-2
    by_text = [Group((images[n], images[3 + n]), texts[:1]) for n in range(3)]
    want = [
        reference.score(pipe, some, texts[:1], timesteps=steps, batch_mean=True)[:, 0]
        for some in (images[:3], images[3:])
    ]
    found = evaluate(m, by_text, batch_mean=3)
    np.testing.assert_allclose([r.scores for r in found.results], torch.stack(want, 1).numpy(), **close)
    # A last batch is as long as it is.
    short = evaluate(m, by_image, batch_mean=2).results
    last = reference.score(pipe, images[2:3], texts, timesteps=steps).numpy()[0]
    np.testing.assert_allclose(short[2].scores, last, **close)


def test_a_batch_shares_the_attention_of_its_right_candidates(groups):
    """Whatever their labels, and whatever failed beside them."""
    scores, found = [[1.0, 5.0, 2.0], [30.0, 10.0, 20.0]], []
    own = [Group(groups[0].images, CAPTIONS[:3], label) for label in (1, 0, 2)]
    for row, noise in zip(scores, ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]), strict=True):
        found.append(GroupScores(np.array([row]), np.array([noise])))
    found.insert(1, Failure("missing", "no such file"))
    result = list(judge(own, found, batch_mean=3, parts=["attention"]))
    # The right ones, 5 and 20; then the others in their order, 1 and 30, 2 and 10.
    np.testing.assert_allclose(result[0].scores, [15.5 + 0.1, 12.5 + 0.2, 6.0 + 0.3])
    np.testing.assert_allclose(result[2].scores, [15.5 + 0.4, 6.0 + 0.5, 12.5 + 0.6])
    np.testing.assert_allclose(result[2].parts["attention"].scores, [15.5, 6.0, 12.5])
    assert result[1].failure is found[1]
    assert result[0].cluster == result[2].cluster
    one = list(judge(own, found, batch_mean=1))
    np.testing.assert_allclose(one[0].scores, [1.1, 5.2, 2.3])
    paired = [Group(groups[3].images, groups[3].texts)] * 2
    matrices = [GroupScores(np.array([[1.0, 2], [3, 4]]) * n, np.zeros((2, 2))) for n in (1, 3)]
    for each in judge(paired, matrices, batch_mean=2):
        assert each.scores.tolist() == [[2, 4], [6, 8]]


def test_the_leak_of_a_batch_mean_in_numbers():
    """Scores that are right about a pair 60 % of the time are right about 84.5 % of the batches of 16."""
    normal, size, batches = NormalDist(), 16, 1000
    shift = normal.inv_cdf(0.6)
    difference = np.random.default_rng(0).normal(shift, 1, size * batches)
    groups, found = synthetic(np.stack([difference, np.zeros_like(difference)], 1))
    alone = Evaluation.of(judge(groups, found), resamples=20).figures["accuracy"].value
    leaky = Evaluation.of(judge(groups, found, batch_mean=size), resamples=20).figures["accuracy"]
    want = normal.cdf(shift * math.sqrt(size))
    assert want == pytest.approx(0.845, abs=5e-4)
    # Four standard errors: of 16,000 questions alone, of 1,000 batches together.
    assert alone == pytest.approx(0.6, abs=4 * math.sqrt(0.6 * 0.4 / len(groups)))
    assert leaky.value == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / batches))
    # The interval knows that there are 1,000 answers, not 16,000: four times as wide as Wilson's.
    width, naive = (high - low for low, high in (leaky.bootstrap, leaky.wilson))
    assert width > 2 * naive


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ties": "last"}, "ties: got 'last', expected 'wrong' or 'right'"),
        ({"batch_mean": 0}, "batch_mean: got 0, expected an integer of at least 1"),
        ({"batch_mean": 2.0}, "batch_mean: got 2.0"),
        ({"batch_mean": 2}, "groups 0 to 1 have 1 images and 2 or 4 texts, expected as many in all groups of a batch"),
        ({"resamples": 0}, "resamples: got 0"),
    ],
)
def test_bad_settings_are_named_before_anything_is_scored(sd15, groups, settings, message):
    with Counted(sd15) as seen, pytest.raises(ValueError, match=message):
        evaluate(matcher(sd15), groups, **settings)
    assert not seen
    if "resamples" not in settings:
        with pytest.raises(ValueError, match=message):
            evaluate_iter(matcher(sd15), groups, **settings)
    with pytest.raises(ValueError, match="example: got int 3"):
        evaluate(matcher(sd15), [3])
