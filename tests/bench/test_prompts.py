"""The suite `prompts`: its sides make the same vectors and predictions, and its counts are those of the formulas."""

import pytest
import torch

from dsd_fast.bench.case import Context
from dsd_fast.bench.suites import prompts

SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def context():
    return Context("cpu")


def agree(work, least):
    """Sides that are right, and a measure that tells when one is not."""
    right = work.oracle() if work.oracle else work.sides[0].run()
    for side in work.sides:
        assert work.difference(side.run(), right) <= work.tolerance
    wrong = work.sides[0].run().flip(0) * 1.01
    assert work.difference(wrong, right) > least * work.tolerance


def test_conversions_are_the_scripts(context):
    work = prompts.conversion(prompts.mini, 3, context)
    agree(work, 100)
    official, ours = work.sides
    assert (official.batch, ours.batch) == (1, 3)
    assert [target.least for target in ours.against[official.name]] == [3.0]


def test_a_large_clip_is_the_models_own(context, monkeypatch):
    monkeypatch.setattr(prompts, "LARGE", 3)
    monkeypatch.setattr(prompts, "CHECKED", 2)
    monkeypatch.setattr(prompts, "_TEXT", {**prompts._TEXT, **SMALL})
    monkeypatch.setattr(prompts, "_VISION", {**prompts._VISION, **SMALL, "image_size": 28})
    work = prompts.large_conversion(context)
    agree(work, 2)
    for side in work.sides:
        model = side.run.__self__.model
        assert (model.dtype, model.clip.dtype) == (torch.bfloat16,) * 2
    assert side.run.__self__.converter.map.exact


def test_a_step_is_diffusers(context, monkeypatch):
    monkeypatch.setattr(prompts, "GUIDED", 2)
    work = prompts.step(context)
    agree(work, 100)
    assert [side.batch for side in work.sides] == [4, 4, 4, 2]


def test_memory_is_told_of_few_and_of_many(context, monkeypatch):
    monkeypatch.setattr(prompts, "STREAMED", (10, 20))
    assert [figure.name for figure in prompts.stream(context)] == ["10 images", "20 images"]


def test_costs_are_those_of_the_formulas(context):
    found = {figure.name: figure.value for figure in prompts.costs(context)}
    # Widths of SD 1.5's 16 cross-attentions: 5 of 320, 5 of 640, 6 of 1280.
    width = 5 * 320 + 5 * 640 + 6 * 1280
    assert found["the keys and values of a text: all keys"] == pytest.approx(2 * 2 * 77 * 768 * width / 1e9)
    assert found["the keys and values of a text, held: 2 keys"] == pytest.approx(2 * 2 * 2 * width / 1e6)
    assert found["10,000 prompts, held: 2 keys"] == pytest.approx(15.36)
    # Logits and their product with the values, at 64², 32², 16² and 8² positions.
    positions = 5 * 320 * 4096 + 5 * 640 * 1024 + 5 * 1280 * 256 + 1280 * 64
    saved = found["a row of the network: all keys"] - found["a row of the network: 2 keys"]
    assert saved == pytest.approx(2 * 2 * 75 * positions / 1e12)
