"""The measure of content shift against hand computations, and on the mini model."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import dsd_fast
from dsd_fast.features import FeatureExtractor, Technique
from dsd_fast.features.shift import Anchor, ShiftMeter, content_shift, laplacian_norm, measure_shift
from dsd_fast.features.shift_result import ShiftResult
from dsd_fast.models.mini.scenes import scene

LAYERS = ("up-level0-repeat1-res-out", "up-level1-repeat0-vit-block0-cross-q")
SCENES = [scene(1_000_000_000 + seed) for seed in range(12)]
IMAGES = [each.image for each in SCENES]
CAPTIONS = [each.caption for each in SCENES]
# The same picture in another batch: see test_extractor.py; the Laplacian adds five such values and sums over positions.
BATCH = 1e-4


@pytest.fixture(scope="module")
def model():
    return dsd_fast.load("mini")


def whole(*shape):
    """Small whole numbers, with which float32 computes exactly."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).float()


def test_laplacian_of_a_point():
    features = torch.zeros(2, 3, 3)
    features[0, 1, 1], features[1, 1, 1] = 3.0, 4.0
    # At a border the neighbour inside counts twice; over channels √(3² + 4²) = 5 times the single channel's
    # 0 2 0
    # 2 4 2
    # 0 2 0.
    expected = torch.tensor([[0.0, 10, 0], [10, 20, 10], [0, 10, 0]])
    assert torch.equal(laplacian_norm(features), expected)


def test_laplacian_of_a_slope_and_a_parabola():
    x = torch.arange(6.0).expand(1, 6, 6)
    # A straight slope has none inside; at its ends the reflection makes it 2.
    assert torch.equal(laplacian_norm(x)[2], torch.tensor([2.0, 0, 0, 0, 0, 2]))
    assert torch.equal(laplacian_norm(x**2)[2, 1:-1], torch.full((4,), 2.0))


def test_channels_are_not_mixed_and_leading_dimensions_stay():
    features = whole(2, 3, 5, 4, 6)
    norms = laplacian_norm(features)
    assert norms.shape == (2, 3, 4, 6)
    single = torch.stack([laplacian_norm(features[1, 2, channel, None]) for channel in range(5)])
    torch.testing.assert_close(norms[1, 2], single.square().sum(0).sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computed_in_float32(dtype):
    features = whole(3, 5, 5)
    assert torch.equal(laplacian_norm(features.to(dtype)), laplacian_norm(features))


def test_no_shift_from_itself_and_from_a_constant():
    reference = whole(2, 3, 4, 6, 6)
    assert torch.equal(content_shift(reference, reference), torch.zeros(2, 3))
    bias = whole(4, 1, 1)
    assert torch.equal(content_shift(reference + bias, reference), torch.zeros(2, 3))


def test_shift_is_the_sum_of_differences():
    reference, features = torch.zeros(1, 3, 3), torch.zeros(1, 3, 3)
    reference[0, 1, 1], features[0, 1, 1] = 1.0, 3.0
    # |2 - 6| at four neighbours and |4 - 12| at the point; a sign does not matter.
    assert content_shift(features, reference) == 4 * 4 + 8
    assert content_shift(-features, reference) == 4 * 4 + 8


def test_normalised_features_are_compared_by_direction():
    features = whole(3, 5, 5) + 9.5
    stretched = features * (1 + torch.rand(5, 5, generator=torch.Generator().manual_seed(1)))
    assert content_shift(stretched, features) > 1
    assert content_shift(stretched, features, normalize=True) < 1e-4


@pytest.mark.parametrize("shape", [(3, 3), (2, 1, 5), (2, 5, 1)])
def test_refuses_maps_without_neighbours(shape):
    with pytest.raises(ValueError, match=r"features has shape .* expected \(…, C, h, w\)"):
        laplacian_norm(torch.zeros(shape))


def result(diffs, anchor):
    diffs = np.asarray(diffs, np.float64)
    names = [tuple(f"{kind}{i}" for i in range(size)) for kind, size in zip("kl", diffs.shape[:2], strict=True)]
    times = tuple(range(1, diffs.shape[2] + 1))
    return ShiftResult(*names, times, diffs, np.asarray(anchor, np.float64), ("plain", 800))


def test_score_of_the_reference_is_one_and_of_the_anchor_zero():
    # Two images, whose anchors differ.
    found = result([[[[0.0, 0.0], [4.0, 8.0], [2.0, 16.0]]]], [[4.0, 8.0]])
    assert np.array_equal(found.scores, [[[[1.0, 1.0], [0.0, 0.0], [0.5, -1.0]]]])
    rows = found.rows()
    assert [row["score"] for row in rows] == [1.0, 0.0, -0.25]
    assert [row["diff"] for row in rows] == [0.0, 6.0, 9.0]
    # Of two images a resample has the first twice, the second twice, or both.
    assert (rows[2]["low"], rows[2]["high"]) == (-1.0, 0.5)
    assert rows[2] | {"low": 0, "high": 0} == {
        "technique": "k0",
        "layer": "l0",
        "timestep": 3,
        "score": -0.25,
        "low": 0,
        "high": 0,
        "diff": 9.0,
        "images": 2,
    }


def test_an_anchor_without_shift_is_refused():
    with pytest.raises(ValueError, match="anchor: its feature 'l1' has no content shift"):
        _ = result(np.ones((1, 2, 1, 1)), [[1.0], [0.0]]).scores


def test_table_and_picture_show_what_was_found():
    found = result(np.arange(12.0).reshape(2, 3, 2, 1), np.full((3, 1), 100.0))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(found.table())
    lines = console.export_text().splitlines()
    (line,) = [line for line in lines if "l1" in line and " 2 " in line]
    assert "0.970 [0.970, 0.970]" in line
    assert "0.910 [0.910, 0.910]" in line
    with Image.open(io.BytesIO(found.picture())) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
    assert found.picture() == found.picture()


def test_measured_as_by_hand(model):
    techniques = [Technique("plain"), Technique("captions", prompts=CAPTIONS[:3])]
    extractor = FeatureExtractor(model, LAYERS, (50, 500))
    found = measure_shift(extractor, IMAGES[:3], techniques, seed=3)
    assert (found.techniques, found.layers, found.timesteps) == (("plain", "captions"), LAYERS, (50, 500))
    assert found.anchor == ("plain", 800)
    by_hand = FeatureExtractor(model, LAYERS, (0, 50, 500, 800))
    for k, features in enumerate(by_hand.extract_each(IMAGES[:3], techniques, seed=3)):
        for i, layer in enumerate(LAYERS):
            norms = []
            for feature in features[layer].flatten(0, 1).double().numpy():
                padded = np.pad(feature, ((0, 0), (1, 1), (1, 1)), mode="reflect")
                inner = padded[:, 1:-1, 1:-1]
                around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
                norms.append(np.sqrt(((around - 4 * inner) ** 2).sum(0)))
            norms = np.stack(norms).reshape(3, 4, *norms[0].shape)
            diffs = np.abs(norms[:, :1] - norms[:, 1:]).sum((-2, -1)).T
            np.testing.assert_allclose(found.diffs[k, i], diffs[:2], rtol=BATCH)
            if k == 0:
                np.testing.assert_allclose(found.anchor_diffs[i], diffs[2], rtol=BATCH)


def test_draws_are_measured_apart_where_they_are_kept(model):
    mean = measure_shift(FeatureExtractor(model, LAYERS, (200,), draws=2, keep_draws=True), IMAGES[:2])
    assert mean.diffs.shape == (1, 2, 1, 2)
    single = measure_shift(FeatureExtractor(model, LAYERS, (200,)), IMAGES[:2])
    # The first of the two draws is the single one's: it is in the mean, and not all of it.
    assert not np.allclose(mean.diffs, single.diffs, rtol=1e-3)
    assert np.all(np.abs(mean.diffs / single.diffs - 1) < 0.5)


def test_the_anchor_scores_zero_and_shift_grows_with_the_timestep(model):
    anchor = Anchor(Technique("empty", prompts=""), 700)
    extractor = FeatureExtractor(model, LAYERS, (0, 20, 100, 300, 500, 700))
    found = measure_shift(extractor, IMAGES, prompts="", anchor=anchor)
    assert found.timesteps == (20, 100, 300, 500, 700)
    np.testing.assert_allclose(found.scores[0, :, -1], 0, atol=BATCH)
    means = found.diffs[0].mean(-1)
    assert (np.diff(means, axis=1) > 0).all()
    assert (found.scores[0, :, 0].mean(-1) > 0.9).all()


def test_captions_of_other_images_shift_features_and_true_ones_do_not(model):
    others = Technique("others", prompts=CAPTIONS[1:] + CAPTIONS[:1])
    techniques = [Technique("empty", prompts=""), Technique("true", prompts=CAPTIONS), others]
    found = measure_shift(FeatureExtractor(model, "practical", (500,)), IMAGES, techniques)
    empty, true, other = found.scores.mean((1, 2))
    assert other.mean() < empty.mean() < true.mean()


def test_techniques_that_start_below_the_anchor(model):
    technique = Technique("from 100", denoise_from=100, denoise_steps=2)
    found = measure_shift(FeatureExtractor(model, LAYERS, (50,)), IMAGES[:2], [technique])
    assert np.isfinite(found.scores).all()


def test_the_timesteps_are_those_used(model):
    extractor = FeatureExtractor(model, LAYERS, (50,), official_timesteps=True)
    found = measure_shift(extractor, IMAGES[:1])
    # PNDM's config has an offset of 1.
    assert (found.timesteps, found.anchor) == ((51,), ("plain", 801))
    by_hand = FeatureExtractor(model, LAYERS, (0, 801)).extract(IMAGES[:1], "")
    for i, layer in enumerate(LAYERS):
        clean, strong = by_hand[layer][0]
        np.testing.assert_allclose(found.anchor_diffs[i, 0], content_shift(strong, clean), rtol=BATCH)


@pytest.mark.parametrize(("anchor", "rows"), [(Technique("b", prompts=""), 3 + 4), (Technique("c"), 2 * 3 + 2)])
def test_the_anchor_shares_the_reference_of_its_technique(model, anchor, rows):
    count = 0

    def counted(_, arguments, kwargs):
        nonlocal count
        count += len(arguments[0])

    techniques = [Technique("a", prompts="a red circle"), Technique("b", prompts="")]
    handle = model.unet.conv_in.register_forward_pre_hook(counted, with_kwargs=True)
    try:
        found = measure_shift(FeatureExtractor(model, LAYERS, (50, 500)), IMAGES[:1], techniques, anchor=Anchor(anchor))
    finally:
        handle.remove()
    # 0, 50 and 500 of each technique, and the anchor's 800, alone with a 0 of its own.
    assert count == rows
    alone = measure_shift(FeatureExtractor(model, LAYERS, (50, 500)), IMAGES[:1], techniques[1:])
    np.testing.assert_allclose(found.diffs[1], alone.diffs[0], rtol=BATCH)
    np.testing.assert_allclose(found.anchor_diffs, alone.anchor_diffs, rtol=BATCH)


def test_refusals(model):
    extractor = FeatureExtractor(model, LAYERS, (50,))
    with pytest.raises(ValueError, match=r"techniques: got \['a', 'a'\], expected at least one, and different names"):
        measure_shift(extractor, IMAGES[:1], [Technique("a"), Technique("a", prompts="x")])
    with pytest.raises(ValueError, match="images: got none"):
        measure_shift(extractor, [])
    with pytest.raises(ValueError, match="timesteps: got 0 alone"):
        ShiftMeter(FeatureExtractor(model, LAYERS, (0,)), [Technique()])
    with pytest.raises(ValueError, match=r"layers: .* has maps \(1, 1\), expected at least 2 x 2"):
        ShiftMeter(FeatureExtractor(model, LAYERS, (50,), pool="mean"), [Technique()])
    with pytest.raises(ValueError, match="prompts: got 2 for 1 images"):
        measure_shift(extractor, IMAGES[:1], [Technique("two", prompts=["a", "b"])])
    with pytest.raises(ValueError, match="seeds: got 2 for 1 images"):
        measure_shift(extractor, IMAGES[:1], seeds=[1, 2])
