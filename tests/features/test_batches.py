"""Features of batches of columns."""

import numpy as np
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.features import ExtractBatch, FeatureExtractor
from tests.engine.batches import encoded, objects, pictures

LAYERS = ("down-level0-repeat0-res-out", "down-level0-downsampler-out")
SETTINGS = {"layers": LAYERS, "timesteps": (50, 200)}


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.mark.parametrize("kind", ["bytes", "arrays"])
def test_a_batch_has_the_features_of_its_rows(model, kind):
    images = pictures(4)
    batch = {
        "image": objects([encoded(image) for image in images]) if kind == "bytes" else images,
        "prompt": objects(["", "a red circle", "word " * 90, "a red circle"]),
        "seed": np.array([0, 5, 0, 2**32 - 1]),
        "key": np.arange(4),
    }
    if kind == "bytes":
        batch["image"][3] = encoded(images[3])[:-40]
    found = ExtractBatch(model, **SETTINGS)(batch)
    assert set(found) == {"prompt", "seed", "key", "error", *LAYERS}
    good = [0, 1] if kind == "bytes" else [0, 1, 3]
    assert [number for number, error in enumerate(found["error"]) if not error] == good
    assert found["error"][2].startswith("the prompt has")
    if kind == "bytes":
        assert found["error"][3] == "image 3 of the batch ends before its last pixel"
    extractor = FeatureExtractor(model, **SETTINGS)
    for layer, values in found.items():
        if layer not in LAYERS:
            continue
        assert values.dtype == np.float32
        for number in range(4):
            if number not in good:
                assert np.isnan(values[number]).all()
                continue
            seed, prompt = int(batch["seed"][number]), batch["prompt"][number]
            alone = extractor.extract([images[number]], prompt, seed)[layer][0].numpy()
            # Batches of other sizes: convolutions agree to 1e-5 of the largest activation.
            assert np.abs(values[number] - alone).max() <= 1e-5 * np.abs(alone).max()


def test_bfloat16_leaves_as_float32(model):
    batch = {"image": pictures(1)}
    found = ExtractBatch(model, dtype="bfloat16", **SETTINGS)(batch)[LAYERS[0]]
    assert found.dtype == np.float32
    whole = ExtractBatch(model, **SETTINGS)(batch)[LAYERS[0]]
    assert (found == torch.from_numpy(whole).bfloat16().float().numpy()).all()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"picture": [1]}, "batch: has no column 'image', expected it among picture"),
        ({"image": np.array([b"abc"])}, r"batch: the column 'image' is of dtype \|S3, expected object"),
        ({"image": pictures(1), "error": ["no"]}, "batch: has error, which the answer has too"),
    ],
)
def test_batches_that_do_not_fit_are_refused(model, batch, message):
    with pytest.raises(ValueError, match=message):
        ExtractBatch(model, **SETTINGS)(batch)


def test_what_is_loaded_takes_no_options_of_loading(model):
    with pytest.raises(ValueError, match="load: got device beside a model that is loaded"):
        ExtractBatch(model, load={"device": "cpu"}, **SETTINGS)
