"""The suite `fit`, small: its figures are those of the public calls, on examples and scenes that never meet."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from benchmarks.suites import fit_ablation, fit_batches, fit_dtype, fit_heads, fit_quality
from benchmarks.suites.intervals import interval
from dsd_fast.bench import Context, Quality
from dsd_fast.bench.run import checked
from dsd_fast.bench.suites import fit, fit_steps
from dsd_fast.bench.suites.shared import mini
from dsd_fast.matching import Group, MatchConfig, Matcher
from dsd_fast.matching.evaluation import evaluate
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.score import PairScorer
from dsd_fast.models.mini.scenes import EVAL_SEED, scene
from dsd_fast.models.processor import units

# Two steps at rates at which they change answers.
QUICK = FitConfig(steps=2, batch_size=3, learning_rate={"lora": 0.1, "heads": 2.0}, warmup=0)
SCENES = 6
TRAINED = ("colour", "shape", "relation")


@pytest.fixture(scope="module")
def context():
    return Context()


def groups(first, n, kinds, held_out=False):
    """Scenes of two objects, the caption against its negatives of some kinds."""
    drawn = [scene(first + place, objects=2, held_out=held_out) for place in range(n)]
    return [Group((each.image,), (each.caption, *(each.negatives()[kind] for kind in kinds))) for each in drawn]


def evaluation_sets(n):
    return {
        "new-scenes": groups(EVAL_SEED, n, TRAINED),
        "held-out-negatives": groups(EVAL_SEED, n, ("swap",)),
        "held-out-pairs": groups(EVAL_SEED, n, TRAINED, held_out=True),
    }


def accuracies(matcher, n):
    """By group of the suite and part of the score, from the public call."""
    found = {}
    for name, every in evaluation_sets(n).items():
        whole = evaluate(matcher, every, parts=True, resamples=1)
        both = {"both": whole} if len(whole.parts) == 2 else {}
        found |= {(name, part): each.figures["accuracy"].value for part, each in (whole.parts | both).items()}
    return found


@pytest.mark.parametrize(
    ("method", "objective", "settings"),
    [
        ("lora", "both", {}),
        ("heads", "attention", {"noise_weight": 0, "layers": None}),
    ],
)
def test_figures_are_means_over_fits_of_what_evaluate_says(context, method, objective, settings):
    if "layers" in settings:
        settings = settings | {"layers": mini_layers(context)}
    wanted = {}
    for number in range(2):
        matcher = Matcher(mini(context), MatchConfig(timesteps=[500], **settings))
        matcher.fit(
            groups(800_000_000 + 1_000_000 * number, 4, TRAINED),
            method,
            config=replace(QUICK, seed=number),
            progress=False,
        )
        for key, value in accuracies(matcher, SCENES).items():
            wanted.setdefault(key, []).append(value)
    figures = fit_quality.adapted(method, objective, 4, context, n=SCENES, fit=QUICK, fits=2)
    found = {}
    for figure in figures:
        assert (figure.n, figure.sizes) == (SCENES, {"examples": 4, "fits": 2})
        part = next((part for part in ("attention", "noise") if f"{part} alone" in figure.name), objective)
        # A part of what was trained is in a table of its own.
        assert figure.group.endswith("-parts") == (part != objective)
        found[figure.group.removesuffix("-parts"), part] = figure.value
    assert found == pytest.approx({key: sum(values) / 2 for key, values in wanted.items()})
    zero = accuracies(Matcher(mini(context), MatchConfig(timesteps=[500], **settings)), SCENES)
    # Otherwise unadapted scores would pass too.
    assert any(found[key] != pytest.approx(zero[key]) for key in found)


def mini_layers(context):
    return PairScorer.of(mini(context), MatchConfig()).program.score_ids


NEGATIVES = {"one-negative": ("colour",)}
METHODS = {"heads": "heads", "heads-real-tokens": "heads"}
FITS = {
    "own-draws": {"shared_noise": False},
    "margin": {"loss": "margin"},
    "weight-decay": {"weight_decay": 0.01},
    "self-attention": {"attention": "all"},
}
SCORES = {
    "real-tokens": {"tokens": "real"},
    "max-pool": {"pool": "max"},
    "all-layers": {"layers": "all"},
    "heads": {"layers": "all"},
    "heads-real-tokens": {"layers": "all", "tokens": "real"},
}


def test_a_change_is_what_its_name_says():
    names = ["base", "own-draws", "margin", "weight-decay", "one-negative", "real-tokens", "max-pool", "all-layers"]
    assert [each.name for each in fit_ablation.CHANGES] == [*names, "self-attention", "heads", "heads-real-tokens"]
    for change in fit_ablation.CHANGES:
        score = MatchConfig(timesteps=[500], **SCORES.get(change.name, {}))
        expected = score, FitConfig(200, 6, **FITS.get(change.name, {}))
        assert fit_ablation.settings(change) == expected
        assert change.method == METHODS.get(change.name, "lora")
        assert change.kinds == NEGATIVES.get(change.name, TRAINED)
        # The table takes a line's name from a colon on.
        assert ": " not in change.says


# The heads' change is all that their scores have over the settings that the test above compares; one negative changes
# what is shown.
@pytest.mark.parametrize("name", ["one-negative", "heads-real-tokens"])
def test_a_change_is_fitted_and_evaluated(context, name):
    change = next(each for each in fit_ablation.CHANGES if each.name == name)
    score = {"layers": mini_layers(context), "tokens": "real"} if name == "heads-real-tokens" else {}
    matcher = Matcher(mini(context), MatchConfig(timesteps=[500], **score))
    zero = accuracies(matcher, SCENES)
    shown = groups(800_000_000, 4, NEGATIVES.get(name, TRAINED))
    matcher.fit(shown, METHODS.get(name, "lora"), config=QUICK, progress=False)
    wanted = accuracies(matcher, SCENES)
    figures = fit_ablation.ablation(change, context, n=SCENES, count=4, fit=QUICK)
    assert [figure.name for figure in figures] == [
        f"{change.says}; new scenes, 4 examples",
        f"{change.says}; held-out pairs, 4 examples",
    ]
    for figure, key in zip(figures, ("new-scenes", "held-out-pairs"), strict=True):
        assert figure.value == pytest.approx(wanted[key, "both"])
        assert (figure.n, figure.chance, figure.sizes) == (SCENES, 1 / 4, {"examples": 4, "fits": 1})
        assert figure.group == "ablation"
    # Otherwise unadapted scores would pass too.
    assert any(wanted[key, "both"] != pytest.approx(zero[key, "both"]) for key in ("new-scenes", "held-out-pairs"))


def test_scores_are_the_matchers_up_to_a_constant_of_the_image(context):
    scenes = fit_quality.evaluation_scenes(context, 3, False)
    assert tuple(scenes.kinds) == ("colour", "shape", "swap", "relation")
    matcher = Matcher(mini(context), MatchConfig(timesteps=[500]))
    found = fit_quality.score(matcher._scorer, scenes)["both"]
    wanted = np.stack([matcher.score(g.images, g.texts)[0] for g in groups(EVAL_SEED, 3, scenes.kinds)])
    # A float32 prediction is off by some 1e-6 of its norm, and norms are about 32: 3e-5 each, of which four are
    # subtracted here; the attention terms, near 5, add a tenth.
    np.testing.assert_allclose(found - found[:, :1], wanted - wanted[:, :1], rtol=0, atol=1.4e-4)
    assert wanted.std(1).min() > 0.02


def test_heads_by_themselves(context, monkeypatch):
    monkeypatch.setattr(fit_heads, "_SCENES_AT_ONCE", 2)
    figures = {figure.name: figure for figure in fit_heads.single_heads(context, n=3)}
    kinds = ("colour", "shape", "swap", "relation")
    every = groups(EVAL_SEED, 3, kinds)

    def shares(layers):
        """Of comparisons with each layer's weights, from the public call."""
        config = MatchConfig(timesteps=[500], layers=layers, noise_weight=0, attention_weight=1)
        matcher = Matcher(mini(context), config)
        scores = np.stack([matcher.score(group.images, group.texts)[0] for group in every])
        return (scores[:, :1] > scores[:, 1:]).mean()

    assert figures.pop("mean of all heads").value == pytest.approx(shares(mini_layers(context)))
    assert len(figures) == 2 * len(mini_layers(context))
    for name in (mini_layers(context)[0], mini_layers(context)[-1]):
        own = [shares({name: np.eye(4)[head].tolist()}) for head in range(4)]
        for which, wanted in (("highest", max(own)), ("lowest", min(own))):
            (figure,) = [each for each in figures.values() if each.name.startswith(f"{name}, {which} of its 4 heads, ")]
            assert figure.value == pytest.approx(wanted)
            assert own[int(figure.name.rpartition(", ")[2])] == wanted
            assert (figure.n, figure.chance) == (3, 0.5)


def test_zero_shot_figures(context, monkeypatch):
    monkeypatch.setattr(fit_quality, "_SCENES_AT_ONCE", 4)
    every = fit_quality.zero_shot(context, n=SCENES)
    figures = {(figure.group, figure.name.partition(": ")[2]): figure for figure in every}
    for layers, name in (("official", ""), (mini_layers(context), " (all layers)")):
        found = accuracies(Matcher(mini(context), MatchConfig(timesteps=[500], layers=layers)), SCENES)
        for (group, part), value in found.items():
            if name and part == "noise":
                continue
            figure = figures.pop((group, f"zero-shot, {part}{name}, 0 examples"))
            assert (figure.value, figure.sizes) == (pytest.approx(value), {"examples": 0})
            assert figure.chance == (1 / 2 if group == "held-out-negatives" else 1 / 4)
    assert not figures


def test_a_tie_is_wrong():
    scores = np.array([[3, 1, 2, 9, 2], [3, 1, 3, 1, 1], [3, 1, 1, 1, 3]], np.float32)
    kinds = ("colour", "shape", "swap", "relation")
    trained, swap, _ = fit_quality.SETS
    assert trained.right(scores, kinds).tolist() == [True, False, False]
    assert swap.right(scores, kinds).tolist() == [False, True, True]


def test_the_interval_draws_scenes():
    right = np.tile(np.arange(1000) < 300, (3, 1))
    # Equal fits leave a mean of 1000 draws with 0.3 of success; a 2.5 % quantile of 1000 resamples has a standard
    # error of √(0.025 · 0.975 / 1000) / density ≈ 0.0012, of which three are allowed.
    wanted = binom.ppf([0.025, 0.975], 1000, 0.3) / 1000
    assert interval(right)[1:] == pytest.approx(tuple(wanted), abs=0.0036)
    assert interval(right)[1:] == interval(right)[1:]


def test_the_interval_draws_fits():
    right = np.repeat([[True], [False]], 500, axis=1)
    # Both are drawn twice as often as 2.5 % of the time: (0, 0) and (1, 1) come up a quarter of the time each.
    assert interval(right)[1:] == pytest.approx((0.0, 1.0))
    assert interval(np.ones((3, 7), bool))[1:] == pytest.approx((1.0, 1.0))


def test_fits_in_two_types_are_the_public_calls(context, monkeypatch):
    monkeypatch.setattr(fit_dtype, "COUNT", 4)
    figures = fit_dtype.fits(context, n=3, fit=QUICK)
    values = []
    for dtype in ("float32", "bfloat16"):
        matcher = Matcher(mini(context, dtype), MatchConfig(timesteps=[500]))
        matcher.fit(groups(800_000_000, 4, TRAINED), config=QUICK, progress=False)
        assert matcher.model.dtype == getattr(torch, dtype)
        values.append(evaluate(matcher, groups(EVAL_SEED, 3, TRAINED), resamples=1).figures["accuracy"].value)
    assert [figure.value for figure in figures[:2]] == values
    assert [(figure.n, figure.sizes) for figure in figures] == [(3, {"examples": 4, "steps": 2})] * 3
    assert [figure.name.rpartition(", ")[2] for figure in figures[:2]] == ["float32", "bfloat16"]
    # What is right in one alone is at least the difference of the shares.
    assert figures[2].value <= 1 - abs(values[0] - values[1]) + 1e-9


def test_a_step_in_bfloat16_is_held_against_float32s(context):
    work = fit_steps.types(context)
    by = " and ".join(units(torch.bfloat16))
    assert [(side.name, side.dtype) for side in work.sides] == [
        ("our step, float32", "float32"),
        ("our step, bfloat16" + (f" by {by}" if by else ""), "bfloat16"),
    ]
    flops, (none, difference) = checked(work)
    assert flops[0] == flops[1] > 0
    assert none == 0.0
    # That of bfloat16 and no more: a float32 network's would be below 1e-3.
    assert 0.01 < difference <= work.tolerance


def test_batch_means_are_those_of_evaluate(context):
    n = 8
    figures = {figure.name: figure for figure in fit_batches.batch_means(context, n=n)}
    matcher = Matcher(mini(context), MatchConfig(timesteps=[500], official=True))
    drawn = [scene(EVAL_SEED + place, objects=2) for place in range(2 * n)]
    questions = {
        "two images": [Group((drawn[i].image, drawn[n + i].image), (drawn[i].caption,)) for i in range(n)],
        "two captions": groups(EVAL_SEED, n, ("colour",)),
    }
    for question, every in questions.items():
        for batch, how in ((None, "each by itself"), (1, "batches of 1"), (16, "batches of 16")):
            ties = "wrong" if batch is None else "right"
            whole = evaluate(matcher, every, batch_mean=batch, ties=ties, parts=True)
            for part, found in (("attention and noise", whole), ("attention alone", whole.parts["attention"])):
                figure = figures.pop(f"{question}, {part}, {how}")
                assert figure.value == found.figures["accuracy"].value
                assert (figure.low, figure.high) == found.figures["accuracy"].bootstrap
                assert (figure.n, figure.chance) == (n, 0.5)
    assert not figures


def test_ties_are_right_under_the_official_conventions_alone(context, monkeypatch):
    (drawn,) = groups(EVAL_SEED, 1, ("colour",))
    monkeypatch.setattr(fit_batches, "_two_images", lambda n: [Group(drawn.images * 2, drawn.texts[:1])])
    monkeypatch.setattr(fit_batches, "_two_captions", lambda n: [Group(drawn.images, drawn.texts[:1] * 2)])
    for figure in fit_batches.batch_means(context, n=1):
        assert figure.value == (0 if figure.name.endswith("by itself") else 1)


def test_examples_are_apart_from_each_other_and_from_the_evaluation():
    assert max(fit_quality.EXAMPLES) <= fit_quality._EXAMPLES_APART
    assert fit_quality.EXAMPLE_SEED + fit_quality._EXAMPLES_APART * fit_quality.FITS <= EVAL_SEED
    first, second = fit_quality.examples(2, 0), fit_quality.examples(2, 1)
    assert {group.texts[0] for group in first}.isdisjoint(group.texts[0] for group in second)
    drawn = scene(800_000_000, objects=2)
    assert first[0].texts == (drawn.caption, *(drawn.negatives()[kind] for kind in TRAINED))
    assert drawn.negatives()["swap"] not in first[0].texts


def test_the_suite_has_what_it_promises():
    names = [case.name for case in fit.suite.cases if isinstance(case, Quality)]
    trials = ["heads/both", "lora/both", "lora+heads/both", "prompt/both"]
    trials += ["heads/attention", "lora/attention", "lora/noise"]
    adapted = [f"{trial}/{count}" for trial in trials for count in (16, 64, 256, 1024)]
    ablation = [f"ablation/{change.name}" for change in fit_ablation.CHANGES]
    assert names == ["zero-shot", *adapted, *ablation, "single-heads", "dtype/quality", "batch-mean"]
    # A run of all that is short does not wait for them.
    assert all(case.long for case in fit.suite.cases if isinstance(case, Quality))
    assert fit_quality.N >= 1000
    assert fit_batches.BATCH_GROUPS >= 1000
    assert fit_quality.FITS >= 3
