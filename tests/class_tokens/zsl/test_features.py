import numpy as np
import pytest
import torch
from PIL import Image

from dsd_fast.class_tokens.zsl import features as module
from dsd_fast.class_tokens.zsl.features import features_of
from dsd_fast.class_tokens.zsl.figures import figures


def test_made_once_in_parts_and_again_where_an_image_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PART", 4)
    monkeypatch.setattr(module, "_TOGETHER", 3)
    files = [tmp_path / f"{number}.png" for number in range(10)]
    for number, file in enumerate(files):
        Image.new("RGB", (4 + number, 5), (number, 0, 0)).save(file)
    files[2].write_bytes(b"no image")
    seen = []

    def features(images):
        seen.extend(int(image[0, 0, 0]) for image in images)
        rows = [[image[0, 0, 0], image.shape[1], np.nan if image[0, 0, 0] == 7 else 0] for image in images]
        return torch.tensor(np.array(rows), dtype=torch.float64)

    def made(about="a", digests="0123456789"):
        seen.clear()
        return features_of(files, list(digests), features, about, tmp_path / "kept")

    rows, errors = made()
    good = [0, 1, 3, 4, 5, 6, 8, 9]
    np.testing.assert_array_equal(rows[good], [[number, 4 + number, 0] for number in good])
    assert np.isnan(rows[[2, 7]]).all()
    assert sorted(errors) == [2, 7]
    assert "no finite numbers" in errors[7]
    assert seen == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    again, same = made()
    np.testing.assert_array_equal(again, rows)
    assert (same, seen) == (errors, [])
    made(digests="01234x6789")
    assert seen == [4, 5, 6, 7]
    made(about="b")
    assert len(seen) == 9


def test_intervals_are_of_images_drawn_anew_within_each_class():
    rng = np.random.default_rng(0)
    labels, seen = np.repeat([0, 1, 2, 3], [100, 50, 80, 20]), np.array([True, True, False, False])
    scores = rng.dirichlet(np.ones(4), 250) + np.eye(4)[labels]
    scores /= scores.sum(1, keepdims=True)
    found = figures(scores, labels, seen, 0.1)
    accuracy, counts = np.array(found["per_class"]), np.array([100, 50, 80, 20])
    for name, classes in (("u", [2, 3]), ("s", [0, 1])):
        error = np.sqrt((accuracy * (1 - accuracy) / counts)[classes].sum()) / 2
        low, high = found["intervals"][name]
        assert found[name] == pytest.approx(accuracy[classes].mean())
        # Of 2,000 draws a quantile is within a tenth of it.
        assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    low, high = found["intervals"]["h"]
    assert low < found["h"] < high
