"""Images of batches of columns."""

import numpy as np

import dsd_fast as dsd
from dsd_fast.generation import GenerateBatch, GenerateConfig, generate
from tests.engine.batches import encoded, objects, pictures

CONFIG = {"steps": 2, "guidance": 3.0}


def images_of(model, *rows):
    return [np.asarray(image) for image in generate(model, rows, GenerateConfig(**CONFIG))]


def test_a_batch_has_the_images_of_its_rows():
    model = dsd.load("mini")
    start = pictures(1)[0]
    batch = {
        "prompt": objects(["a red circle", "word " * 90, "a blue square", "a red circle"]),
        "seed": np.array([1, 2, 2**64 - 1, 4], np.uint64),
        "guidance": np.array([np.nan, 1, 1, np.nan]),
        "image": objects([None, None, encoded(start), encoded(start)[:-40]]),
        "key": np.arange(4),
    }
    found = GenerateBatch(model, **CONFIG)(batch)
    assert set(found) == {*batch, "error"}
    assert found["error"][1].startswith("prompt: ")
    assert found["error"][3] == "image 3 of the batch ends before its last pixel"
    assert list(found["error"][[0, 2]]) == ["", ""]
    alone = images_of(
        model,
        {"prompt": "a red circle", "seed": 1},
        {"prompt": "a blue square", "seed": 2**64 - 1, "guidance": 1.0, "image": start},
    )
    assert found["image"].dtype == np.uint8
    for image, expected in zip(found["image"][[0, 2]], alone, strict=True):
        # Batches of other sizes: within one level.
        assert np.abs(image.astype(int) - expected).max() <= 1
    assert not found["image"][[1, 3]].any()


def test_sizes_that_differ_and_a_batch_without_a_usable_row():
    model = dsd.load("mini")
    make = GenerateBatch(model, **CONFIG)
    found = make({"prompt": ["a", "a"], "height": [64, 32], "width": [64, 64]})["image"]
    assert [image.shape for image in found] == [(64, 64, 3), (32, 64, 3)]
    refused = make({"prompt": ["a"], "steps": [0]})
    assert refused["error"].tolist() == ["the row, column 'steps': got 0, expected a positive integer below 2**31"]
    assert refused["image"].shape == (1, *make.sampler.engine.size, 3)
