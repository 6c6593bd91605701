"""Class tokens on a CUDA device."""

import pytest
import torch

pytest.importorskip("diffusers")

import dsd_fast as dsd
from dsd_fast.bench.case import Context
from dsd_fast.bench.suites import tokens
from dsd_fast.class_tokens import ClassTokenLearner, TokenConfig

pytestmark = pytest.mark.gpu

NAMES = ["red circle", "blue ring", "green square"]
CONFIG = TokenConfig(
    templates=("a {}", "a small {}"),
    class_name=False,
    images=2,
    steps=4,
    guidance=3.0,
    learning_rate=0.02,
    stopping="never",
    updates=3,
)


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def losses(device, out=None, callback=None, **changes):
    model = dsd.load("mini", device=device, local_files_only=True)
    learner = ClassTokenLearner(model, "clip", TokenConfig(**{**vars(CONFIG), **changes}))
    learned = learner.learn(NAMES, out=out, callback=callback)
    return learned, [learner.history[name].losses for name in NAMES]


def test_the_gradients_are_the_official_loops(monkeypatch):
    monkeypatch.setattr(tokens, "CLASSES", 2)
    work = tokens.together(Context("cuda"))
    right = work.oracle()
    for side in work.sides:
        assert work.difference(side.run(), right) <= work.tolerance


def test_learning_is_that_of_the_cpu():
    _, here = losses("cuda")
    _, there = losses("cpu")
    for own, other in zip(here, there, strict=True):
        # AdamW's first steps are the signs of gradients: single signs may differ.
        assert own[0] == pytest.approx(other[0], rel=1e-3)
        assert own == pytest.approx(other, rel=5e-2)


@pytest.mark.parametrize("change", [{"checkpointing": True}, {"together": 1}, {"memory_budget": 1 << 26}], ids=str)
def test_less_memory_gives_the_same_losses(change):
    _, whole = losses("cuda")
    _, less = losses("cuda", **change)
    for own, other in zip(less, whole, strict=True):
        assert own[0] == pytest.approx(other[0], rel=1e-3)
        assert own == pytest.approx(other, rel=5e-2)


def test_half_precision():
    model = dsd.load("mini", device="cuda", dtype="float16", local_files_only=True)
    learner = ClassTokenLearner(model, "clip", CONFIG)
    learned = learner.learn(NAMES)
    assert all(torch.isfinite(learned[token]).all() for token in learned)
    assert {learner.history[name].ended for name in NAMES} == {"updates"}


def test_learning_goes_on_where_it_was_interrupted(tmp_path):
    def interrupt(event):
        if event.update == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        losses("cuda", tmp_path, interrupt)
    parts, _ = losses("cuda", tmp_path)
    whole, _ = losses("cuda")
    for token in whole:
        torch.testing.assert_close(parts[token], whole[token], rtol=0, atol=1e-2)
