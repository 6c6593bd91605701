import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import decomposition

from dsd_fast.features.pca import PCA, picture


def correlated(images=6, channels=12, side=7, offset=100.0, seed=0):
    """(images, channels, side, side) float64 whose components have well separated variances, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(images, channels, side, side, generator=generator, dtype=torch.float64)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    scales = 2.0 ** -torch.arange(channels, dtype=torch.float64)
    return torch.einsum("ij,njhw->nihw", torch.linalg.qr(mixing)[0] * scales, sources) + offset


def rows(features):
    return features.movedim(-3, -1).flatten(0, -2).double().numpy()


def test_mean_components_and_variances_are_those_of_scikit_learn():
    features = correlated()
    found = PCA.fit(features, 5)
    assert torch.equal(features, correlated())
    expected = decomposition.PCA(5, svd_solver="full").fit(rows(features))
    assert [value.dtype for value in (found.mean, found.components, found.explained_variance)] == [torch.float32] * 3
    # Both are exact to float64, whose rounding the offset of 100 enlarges to 1e-14 of variances of at least 1e-3 a
    # component, so what is left is the final rounding to float32, 6e-8 of each value.
    np.testing.assert_allclose(found.mean, expected.mean_, rtol=1e-7)
    np.testing.assert_allclose(found.components, expected.components_, atol=1e-7)
    np.testing.assert_allclose(found.explained_variance, expected.explained_variance_, rtol=1e-6)
    # Coordinates: 12 products of differences of numbers near 100, which float32 holds to 8e-6.
    np.testing.assert_allclose(
        rows(found.transform(features.float())), expected.transform(rows(features)), atol=12 * 8e-6
    )


def test_any_batches_give_the_same_components():
    features = correlated()
    whole = PCA.fit(features, 4)
    # Of different sizes, with more leading dimensions, with none, and empty.
    parts = [features[:1], features[1:5].unflatten(0, (2, 2)), features[5, :, :3], features[5, :, 3:], features[:0]]
    parted = PCA.fit(iter(parts), 4)
    for name in ("mean", "components", "explained_variance"):
        torch.testing.assert_close(getattr(parted, name), getattr(whole, name), rtol=1e-6, atol=1e-7)


def test_half_precision_features_are_not_summed_in_half_precision():
    # 4096 positions near 1000: a float16 sum would overflow, a float32 sum of squares would lose the variance.
    features = (torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1)) + 1000).half()
    found = PCA.fit(features, 4)
    expected = decomposition.PCA(4, svd_solver="full").fit(rows(features))
    np.testing.assert_allclose(found.explained_variance, expected.explained_variance_, rtol=1e-6)


def test_many_positions_are_taken_in_chunks(monkeypatch):
    features = correlated()
    whole = PCA.fit(features, 3)
    monkeypatch.setattr("dsd_fast.features.pca._CHUNK", 2 * features[0].numel())
    torch.testing.assert_close(PCA.fit(features, 3).components, whole.components, rtol=0, atol=1e-7)


def test_the_result_keeps_type_and_is_channels_last():
    features = correlated()
    pca = PCA.fit(features, 5)
    for x in (features.half(), features.half().contiguous(memory_format=torch.channels_last)):
        found = pca.transform(x)
        assert found.shape == (6, 5, 7, 7)
        assert found.dtype == torch.float16
        assert found.is_contiguous(memory_format=torch.channels_last)
        # Float32 inside: only the result is rounded, to 2^-11 of itself.
        torch.testing.assert_close(found.float(), pca.transform(x.float()), rtol=2**-11, atol=1e-7)


def test_it_is_saved_and_loaded(tmp_path):
    pca = PCA.fit(correlated(), 3)
    pca.save(tmp_path / "new" / "pca.safetensors")
    loaded = PCA.load(str(tmp_path / "new" / "pca.safetensors"))
    for name in ("mean", "components", "explained_variance"):
        assert torch.equal(getattr(loaded, name), getattr(pca, name))


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="missing"):
        PCA.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="no safetensors file"):
        PCA.load(tmp_path / "text")
    save_file({"mean": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"PCA\.save"):
        PCA.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"expected \(C,\), \(k, C\), \(k,\)"):
        PCA(torch.zeros(3), torch.zeros(2, 4), torch.zeros(2))


def test_bad_input_is_named():
    features = correlated()
    pca = PCA.fit(features, 3)
    cases = [
        (lambda: PCA.fit(features, 0), "components: got 0"),
        (lambda: PCA.fit(features, 13), "12 channels and 294 positions"),
        (lambda: PCA.fit(features[:1, :, :1, :2], 3), "12 channels and 2 positions"),
        (lambda: PCA.fit([], 3), "got 0 positions"),
        (lambda: PCA.fit([features, features[:, :4]], 3), "batches: got 4 channels, expected 12"),
        (lambda: PCA.fit([features.long()], 3), "float type"),
        (lambda: PCA.fit(features.where(features > 100, torch.nan), 3), "not finite"),
        (lambda: pca.transform(features[0]), r"expected \(B, C, h, w\)"),
        (lambda: pca.transform(features[:, :4]), "x: got 4 channels"),
        (lambda: picture(features[0, 0]), "features: got shape"),
        (lambda: picture(features, resample="linear"), "resample: got 'linear'"),
        (lambda: picture(features, size=(0, 3)), "size: got"),
        (lambda: picture(features, quantiles=(0.9, 0.1)), "quantiles: got"),
        (lambda: picture(features, pca=PCA.fit(features, 2)), "pca: got 2 components"),
        (lambda: picture(features.where(features > 100, torch.inf), pca=pca), "features: some values are not finite"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_picture_shows_three_components():
    # Three channels that are their own components: variances 9 : 4 : 1, uncorrelated by construction.
    red, green, blue = torch.meshgrid(torch.arange(2.0), torch.arange(2.0), torch.arange(2.0), indexing="ij")
    features = torch.stack([3 * red, 2 * green, blue]).reshape(3, 2, 4)
    expected = 255 * torch.stack([red, green, blue], -1).reshape(2, 4, 3)
    shown = picture(features, quantiles=(0, 1))
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown, expected)


def test_colours_agree_between_images_and_a_flat_component_is_grey():
    first = correlated(images=1, side=8)[0]
    both = torch.stack([first, first.flip(-1)])
    shown = picture(both)
    np.testing.assert_array_equal(shown[1], shown[0][:, ::-1])
    np.testing.assert_array_equal(picture(both, pca=PCA.fit(both, 4)), shown)
    flat = torch.zeros(3, 2, 2)
    flat[0, 0] = 1
    assert (picture(flat)[..., 1:] == 128).all()


def test_outliers_do_not_take_the_colours():
    features = correlated(images=1, side=32, offset=0)[0]
    features[:, 0, 0] = 1e4 * torch.linspace(-1, 1, 12, dtype=torch.float64)
    assert picture(features, quantiles=(0, 1))[..., 0].std() < 10
    assert picture(features)[..., 0].std() > 50


@pytest.mark.parametrize(("resample", "way"), [("nearest", Image.Resampling.NEAREST), ("bicubic", Image.BICUBIC)])
def test_pictures_are_enlarged_by_pil(resample, way):
    features = correlated(images=2)
    small, large = picture(features), picture(features, size=(21, 28), resample=resample)
    assert large.shape == (2, 21, 28, 3)
    for i in range(2):
        np.testing.assert_array_equal(large[i], Image.fromarray(small[i]).resize((28, 21), way))
