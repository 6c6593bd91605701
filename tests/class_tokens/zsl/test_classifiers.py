import numpy as np
import pytest
from scipy.special import softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from dsd_fast.class_tokens.zsl.classifiers import CLASSIFIERS, probabilities

CENTRES = np.random.default_rng(0).standard_normal((3, 6)) * 3


def drawn(counts, seed, apart=1.0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), counts)
    return (apart * CENTRES[labels] + rng.standard_normal((len(labels), 6))) * 100 + 7, labels


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_tells_classes_apart_and_a_small_class_counts_as_much(kind):
    features, labels = drawn((2000, 200, 50), 1, 0.2)
    test, truth = drawn((300, 300, 300), 2, 0.2)
    found = probabilities(kind, features, labels, 3, test)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    right = found.argmax(1) == truth
    assert min(right[truth == c].mean() for c in range(3)) > 0.6


def test_gaussians_are_linear_discriminant_analysis_with_equal_priors():
    # Of many more images than features there is nothing to shrink, and both estimate the same covariance.
    features, labels = drawn((4000, 4000, 4000), 3)
    test, _ = drawn((50, 50, 50), 4)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(3, 1 / 3)).fit(features, labels)
    found = probabilities("gaussian", features, labels, 3, test)
    np.testing.assert_allclose(found, softmax(oracle.decision_function(test) / 6, axis=1), atol=2e-3)
    assert (found.argmax(1) == oracle.predict(test)).all()


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_one_image_of_a_class_and_features_that_never_change(kind):
    features = np.concatenate([CENTRES, np.full((3, 2), 5.0)], 1)
    found = probabilities(kind, features, np.arange(3), 3, features)
    assert np.isfinite(found).all()
    assert (found.argmax(1) == np.arange(3)).all()


def test_refuses():
    with pytest.raises(ValueError, match="none of class 1"):
        probabilities("softmax", CENTRES, np.array([0, 0, 2]), 3, CENTRES)
    with pytest.raises(ValueError, match="softmax, gaussian"):
        probabilities("svm", CENTRES, np.arange(3), 3, CENTRES)
