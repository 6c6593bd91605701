"""The suite `feature-quality`, small: what its tasks read, against the plain way, and that no label leaks into them."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.mini.lora import night
from benchmarks.suites.feature_quality import (
    conditions,
    data,
    figures,
    keypoints,
    mixing,
    outcomes,
    pixels,
    probes,
    shift,
    suite,
)
from benchmarks.suites.feature_quality.conditions import CONDITIONS, Features, named
from benchmarks.suites.feature_quality.data import Size
from benchmarks.suites.intervals import interval
from dsd_fast.bench import Context
from dsd_fast.bench.case import UnavailableError
from dsd_fast.bench.suites.shared import mini
from dsd_fast.bench.tables import line_of
from dsd_fast.features import FeatureExtractor
from dsd_fast.features.shift import content_shift
from dsd_fast.metrics import mean_iou
from dsd_fast.models.mini.scenes import EVAL_SEED, SHAPES

SMALL = Size(scenes=12, examples=16, labelled=(2, 3), runs=2, steps=3)


@pytest.fixture(scope="module")
def context():
    return Context()


@pytest.fixture(scope="module")
def drawn():
    return data.scenes(Size(scenes=40), None)


def random_maps(count, *shapes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Features([F.normalize(torch.randn(count, *shape, generator=draw), dim=1) for shape in shapes])


def test_scenes_are_held_out_and_runs_share_none():
    size = Size(scenes=3, examples=4)
    seeds = [{each.seed for each in data.scenes(size, run)} for run in (None, 0, 1)]
    assert min(seeds[0]) == EVAL_SEED
    assert all(900_000_000 <= seed < EVAL_SEED for seed in seeds[1] | seeds[2])
    assert not seeds[1] & seeds[2]
    noise = [data.seeds(5, run, examples) for run in range(3) for examples in (False, True)]
    assert len(set(itertools.chain(*noise))) == 5 * 6


def test_prompts_do_not_name_what_is_asked_for(drawn):
    each = next(one for one in drawn if one.caption.startswith("a small"))
    first, second = each.objects
    told = f"a small {first.colour} object {each.relation} a {'' if not second.named_size else second.size + ' '}"
    assert conditions.caption(each, "words") == f"{told}{second.colour} object"
    assert conditions.caption(each, "quality") == f"{told}{second.colour} object, high quality"
    assert conditions.caption(each, "empty") == ""
    for one in drawn:
        assert not set(SHAPES) & set(conditions.caption(one, "words").split())
        assert conditions.caption(one, "caption") == one.caption
        # Of all shapes, whatever the scene shows.
        assert conditions.caption(one, "shapes") == "a circle a square a triangle a cross a ring"


def test_pairs_show_one_shape_in_another_colour_and_size(drawn):
    found = data.pairs(drawn)
    assert len(found) > 30
    for pair in found:
        assert pair.source != pair.target
        assert pair.of in drawn[pair.source].objects
        assert pair.to in drawn[pair.target].objects
        assert pair.of.shape == pair.to.shape
        assert pair.of.colour != pair.to.colour
        assert pair.of.size != pair.to.size
    assert {pair.of.shape for pair in found} == set(SHAPES)


def test_labels_are_the_masks_at_every_third_pixel(drawn):
    found = data.labels(drawn[:3])
    assert found.shape == (3, 22, 22)
    for each, classes in zip(drawn, found, strict=False):
        for item in each.objects:
            assert (classes == 1 + SHAPES.index(item.shape)).tolist() == item.mask[::3, ::3].tolist()
    shown = [[shape in {item.shape for item in each.objects} for shape in SHAPES] for each in drawn]
    assert data.present(drawn).tolist() == shown


def test_keypoints_are_found_as_the_plain_way_finds_them(drawn):
    maps = random_maps(len(drawn), (7, 8, 8), (5, 16, 16))
    pairs = data.pairs(drawn)[:6]
    found = keypoints.find(maps, pairs)
    for pair, points in zip(pairs, found, strict=True):
        source = maps.grid([pair.source])[0].double()
        target = F.interpolate(maps.grid([pair.target]).double(), (64, 64), mode="bilinear")[0]
        for name, point in zip(data.KEYPOINTS, points, strict=True):
            # The keypoint lies between the centres of four cells, each of four pixels.
            x, y = np.array(pair.of.keypoints[name]) / 4 - 0.5
            i, j = int(y), int(x)
            corners = source[:, i : i + 2, j : j + 2]
            row = corners[:, :, 0] * (1 - (x - j)) + corners[:, :, 1] * (x - j)
            query = row[:, 0] * (1 - (y - i)) + row[:, 1] * (y - i)
            cosine = torch.einsum("c,cyx->yx", query, target) / target.norm(dim=0)
            best = divmod(int(cosine.argmax()), 64)
            assert point.tolist() == [best[1] + 0.5, best[0] + 0.5]


def test_correct_is_told_by_the_targets_box_or_the_picture(drawn):
    pairs = data.pairs(drawn)[:5]
    true = keypoints.points(pairs, target=True)
    assert true[0, 1].tolist() == list(pairs[0].to.keypoints["top"])
    x0, y0, x1, y1 = pairs[0].to.box
    near = 0.1 * max(x1 - x0, y1 - y0) - 1e-9
    assert keypoints.correct(true + np.array([near, 0]), pairs, 0.1, box=True)[0].all()
    assert not keypoints.correct(true + np.array([near + 0.1, 0]), pairs, 0.1, box=True)[0].any()
    assert keypoints.correct(true + np.array([0, 6.39]), pairs, 0.1, box=False).all()
    assert not keypoints.correct(true + np.array([0, 6.41]), pairs, 0.1, box=False).any()
    # Within 6.4 pixels of a point lie about π · 6.4² of 4096, fewer near the border.
    assert 0.02 < keypoints.chance(pairs, 0.1, box=False) <= np.pi * 6.4**2 / 4096 + 0.001


def test_enlarging_is_bilinear():
    maps = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    wanted = F.interpolate(maps, (64, 64), mode="bilinear")[:, :, ::3, ::3].movedim(1, 3)
    torch.testing.assert_close(pixels.enlarged(maps), wanted)


def test_a_pixel_classifier_learns_what_maps_tell(drawn):
    taught, asked = drawn[:16], drawn[16:]
    # The classes' shares of each cell, which tell the class of all pixels but those at edges.
    shown = torch.from_numpy(np.stack([one_hot(each) for each in drawn])).float()
    maps = Features([F.avg_pool2d(shown, 4)])
    learnt, told = Features([maps.maps[0][:16]]), Features([maps.maps[0][16:]])
    truth = data.labels(asked)
    counts = pixels.confusions(learnt, told, data.labels(taught), truth, 200, 0)
    assert counts.sum(2).tolist() == [np.bincount(each.ravel(), minlength=6).tolist() for each in truth]
    assert float(mean_iou(counts.sum(0))) > 0.85
    # Features that say nothing leave the class that is most common.
    nothing = random_maps(16, (6, 16, 16)), random_maps(24, (6, 16, 16), seed=1)
    assert float(mean_iou(pixels.confusions(*nothing, data.labels(taught), truth, 50, 0).sum(0))) < 0.25


def one_hot(each):
    classes = np.zeros((6, 64, 64), bool)
    for item in each.objects:
        classes[1 + SHAPES.index(item.shape)] |= item.mask
    classes[0] = ~classes.any(0)
    return classes


def test_predicting_on_small_maps_is_predicting_on_large_ones(drawn):
    maps = random_maps(5, (9, 16, 16))
    ensemble = pixels.Ensemble(9, 6, 0)
    with torch.no_grad():
        rows = pixels.enlarged(maps.grid(slice(0, 5)))
        first = torch.cat(list(ensemble.weights[0]), 1)
        small = pixels.enlarged((maps.grid(slice(0, 5)).movedim(1, 3) @ first).movedim(3, 1))
        small = small.view(*small.shape[:3], pixels.MEMBERS, -1).movedim(3, 0).flatten(1, 3)
        torch.testing.assert_close(ensemble.rest(small), ensemble(rows.flatten(0, 2)), rtol=1e-4, atol=1e-4)
    # Members differ, and seeds set them.
    assert not torch.equal(ensemble.weights[0][0], ensemble.weights[0][1])
    assert torch.equal(ensemble.weights[0], pixels.Ensemble(9, 6, 0).weights[0])


def test_a_probe_names_the_two_likeliest(drawn):
    shown = data.present(drawn)
    maps = torch.zeros(40, 5, 16, 16)
    maps[:, :, 3, 4] = torch.from_numpy(shown).float()
    taught, asked = Features([maps[:24]]), Features([maps[24:]])
    assert probes.pooled(asked, 16)[:, :5].tolist() == (maps[24:].mean((2, 3))).tolist()
    assert probes.pooled(asked, 16)[:, 5:].tolist() == shown[24:].astype(float).tolist()
    assert probes.probe(taught, asked, shown[:24], shown[24:]).all()
    turned = np.roll(shown, 1, 1)
    wrong = probes.probe(taught, asked, turned[:24], shown[24:])
    assert wrong.tolist() == [
        set(np.flatnonzero(a)) == set(np.flatnonzero(b)) for a, b in zip(shown[24:], turned[24:], strict=True)
    ]


def test_intervals_draw_runs_and_scenes():
    values = np.random.default_rng(2).random((3, 50)) < 0.4
    value, low, high = interval(values)
    assert value == pytest.approx(values.mean())
    # The same bootstrap by another hand.
    draw = np.random.default_rng(0)
    of_runs, of_scenes = (draw.multinomial(count, np.full(count, 1 / count), 1000) / count for count in values.shape)
    means = np.einsum("rf,fn,rn->r", of_runs, values.astype(float), of_scenes)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    counts = np.random.default_rng(3).integers(0, 9, (2, 5, 3, 3))
    value, low, high = interval(counts, mean_iou)
    assert value == pytest.approx(float(mean_iou(counts.sum((0, 1)))))
    assert low < value < high
    assert interval(np.ones((2, 4))) == (1, 1, 1)


def test_an_amalgamation_learns_which_map_tells(drawn):
    shown = torch.from_numpy(np.stack([one_hot(each) for each in drawn[:16]])).float()
    telling, noise = Features([F.avg_pool2d(shown, 4)]), random_maps(16, (6, 16, 16))
    learnt = mixing.learn([noise, telling], data.labels(drawn[:16]), 0)
    mixed = mixing.mix(learnt, [noise, telling])
    assert len(mixed) == 16
    assert mixed.grid([3, 5]).shape == (2, 12, 16, 16)
    with torch.no_grad():
        weights = learnt.amalgamate([noise.grid([3, 5]), telling.grid([3, 5])]).weights
    assert weights[:, :, 1].mean() > 0.6
    again = mixing.mix(mixing.learn([noise, telling], data.labels(drawn[:16]), 0), [noise, telling])
    assert torch.equal(again.grid([0]), mixed.grid([0]))


def test_features_are_those_of_the_public_call(context):
    examples, told = conditions.features(context, named("words"), 1, SMALL)
    assert (len(examples), len(told)) == (16, 12)
    scene = data.scenes(SMALL, 1)[4]
    extractor = FeatureExtractor(mini(context), "practical-mini", [50], normalize=True)
    prompt = conditions.caption(scene, "words")
    wanted = extractor.extract([scene.image], prompt, seeds=[data.seeds(5, 1, examples=True)[4]])
    # Half precision rounds to 2⁻¹¹ of values up to 1.
    for ours, right in zip(examples.maps, wanted.values(), strict=True):
        torch.testing.assert_close(ours[4].float(), right[0, 0], rtol=1e-3, atol=1e-3)
    assert examples.grid([0]).shape == (1, 384, 16, 16)
    parts = conditions.features(context, named("timesteps"), 1, SMALL)[1]
    assert [each.shape[1] for each in parts.maps] == [96] * 12
    assert torch.equal(parts.maps[4], conditions.features(context, named("t-150"), 1, SMALL)[1].maps[0])


def test_figures_are_means_over_runs_and_gains_are_differences(context):
    found = {name: figures.measured(named(name), context, size=SMALL) for name in ("plain", "words")}
    wide = {group.name: group.wide for group in suite.groups}
    values = {}
    for name, made in found.items():
        assert {each.group for each in made} <= set(wide)
        own = outcomes.outcome(context, named(name), SMALL)
        assert own.named.shape == (2, 12)
        probe = next(each for each in made if each.group == "probe")
        assert probe.value == pytest.approx(own.named.mean())
        few = next(each for each in made if each.name.endswith(", 3 labelled images"))
        assert few.value == pytest.approx(float(mean_iou(own.confusions[3].sum((0, 1)))))
        pairs = outcomes.paired(context, SMALL)
        box = next(each for each in made if each.group == "keypoints-box" and each.sizes["percent"] == 10)
        right = [keypoints.correct(each, pairs, 0.1, box=True) for each in own.found]
        assert box.value == pytest.approx(np.mean(right))
        values[name] = {"box": box.value, "probe": probe.value, "mIoU": few.value}
    made = [*found["plain"], *found["words"], *shift.shifted(named("words"), context, size=SMALL)]
    assert len({each.name for each in made}) == len(made)
    # A wide table has a line for each condition, and takes the line's name from the figures'.
    lines = {line_of({"name": each.name}) for each in made if wide[each.group]}
    assert lines == {named("plain").says, named("words").says}
    assert not [each for each in found["plain"] if each.group == "gain"]
    told = figures.measured(named("caption"), context, size=SMALL)
    # With the label in the prompt nothing but keypoints may be measured.
    assert {each.group for each in told} == {"keypoints-box", "keypoints-image", "keypoints-shapes", "gain"}
    assert sum(each.group == "gain" for each in told) == 2
    for each in (each for each in found["words"] if each.group == "gain"):
        key = next((key for key in ("box", "mIoU") if key in each.name), "probe" if "named" in each.name else None)
        if key is not None:
            assert each.value == pytest.approx(values["words"][key] - values["plain"][key])


def test_a_shift_is_told_against_the_plain_feature_at_800(context):
    size = Size(scenes=2, examples=2)
    found = shift.scores(context, named("t-250"), size)
    scenes = data.scenes(size, None)
    extractor = FeatureExtractor(mini(context), "practical-mini", [0, 250, 800])
    maps = extractor.extract([each.image for each in scenes], seeds=data.seeds(2, 0, examples=False)).values()
    diffs = [[content_shift(each[:, k], each[:, 0]) for k in (1, 2)] for each in maps]
    wanted = torch.stack([(anchor - own) / anchor for own, anchor in diffs]).mean(0)
    assert found == pytest.approx(wanted.numpy(), rel=1e-4)
    assert not shift.measurable(named("t-0"))
    assert not shift.measurable(named("timesteps"))


def test_correlations_are_ranks_over_conditions(monkeypatch):
    context, size = Context(), Size(scenes=40, examples=1, labelled=(2,), runs=1)
    pairs = outcomes.paired(context, size)
    true = keypoints.points(pairs, target=True)[None]
    shown = [each for each in CONDITIONS if shift.measurable(each) and not each.night and not each.told]
    for rank, each in enumerate(shown):
        right = np.arange(40)[None] <= rank
        # The probe rises with the score, the classifier falls, and so do keypoints.
        counts = np.zeros((1, 40, 6, 6), int)
        counts[:, :, 0, 0], counts[:, :, 1, 1], counts[:, :, 1, 0] = 9, len(shown) - rank, rank
        made = outcomes.Outcome(true + 99.0 * (np.arange(len(pairs)) < rank)[:, None, None], {2: counts}, right)
        context.shared(f"outcome, {each.name}, {size}", lambda made=made: made)
        context.shared(f"shift, {each.name}, {size}", lambda rank=rank: np.full(40, rank / 20))
    found = {each.name: each for each in shift.correlations(context, size=size)}
    assert len(found) == 8
    rises, falls = (
        found[f"all conditions: score and {name}"] for name in ("both shapes named", "mIoU, 2 labelled images")
    )
    assert (rises.value, falls.value) == pytest.approx((1, -1))
    assert found["all conditions: score and PCK@0.1 of the box"].value == pytest.approx(-1)
    assert rises.n == len(shown)
    early = [each.timestep == 50 for each in shown]
    assert found["conditions at t = 50: score and both shapes named"].n == sum(early)


def test_what_is_not_shipped_is_left_out(context, monkeypatch, tmp_path):
    monkeypatch.setattr(conditions, "path", lambda: tmp_path)
    for name in ("control", "lora", "together"):
        with pytest.raises(UnavailableError, match="the embedded model has no"):
            conditions.extractor(Context(), named(name))


def test_night_is_what_the_lora_was_made_for(drawn):
    plain, printed = (conditions.pictures(named(name), drawn[:3]) for name in ("plain", "night-lora"))
    assert all(one is each.image for one, each in zip(plain, drawn, strict=False))
    assert all(np.array_equal(one, night(each.image, each.seed)) for one, each in zip(printed, drawn, strict=False))
    assert [conditions.base(named(name)).name for name in ("lora", "night-lora")] == ["plain", "night"]


def test_every_condition_is_a_case_and_changes_something():
    names = [each.name for each in CONDITIONS]
    assert len(set(names)) == len({each.says for each in CONDITIONS}) == len(names)
    cases = [case.name for case in suite.cases]
    assert [case for case in cases if "/" not in case] == [*names, "shift-tells"]
    assert {part for each in CONDITIONS for part in each.parts} <= set(names)
    assert [each.name for each in CONDITIONS if each.prompt == "caption"] == [
        each.name for each in CONDITIONS if each.told
    ]
