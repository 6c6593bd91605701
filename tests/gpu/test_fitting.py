"""Few-shot adaptation on a CUDA device."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")

import dsd_fast as dsd
from benchmarks.suites.fit_quality import examples
from dsd_fast.bench.case import Context
from dsd_fast.bench.suites import fit_steps

pytestmark = pytest.mark.gpu

GROUPS = examples(4, 0)
FIT = dsd.FitConfig(steps=4, batch_size=2, validate_every=2)


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini", device="cuda", local_files_only=True)


def matcher(model):
    return dsd.Matcher(model, dsd.MatchConfig(timesteps=[500]))


def losses(fitted, config, **options):
    found = []
    fitted.fit(
        GROUPS,
        ["lora", "prompt", "heads"],
        config=config,
        progress=False,
        callback=lambda *step: found.append(step),
        **options,
    )
    return [loss for _, loss, _ in found if loss is not None]


@pytest.mark.parametrize("layers", fit_steps.LAYERS)
def test_the_gradient_is_the_official_steps(layers):
    work = fit_steps.work(lambda context: fit_steps.mini_step(context, layers=layers), Context("cuda"))
    official, *ours = [side.run() for side in work.sides]
    for gradient in ours:
        assert work.difference(gradient, official) <= work.tolerance


def test_a_fit_is_that_of_the_cpu(model):
    here = losses(matcher(model), FIT)
    there = losses(matcher(dsd.load("mini", local_files_only=True)), FIT)
    # Four steps of AdamW, whose first ones are the signs of gradients: single signs may differ.
    assert here[0] == pytest.approx(there[0], rel=1e-4)
    assert here == pytest.approx(there, rel=2e-2)


@pytest.mark.parametrize("change", [{"checkpointing": True}, {"micro_batch": 1}], ids=str)
def test_less_memory_gives_the_same_first_step(model, change):
    assert losses(matcher(model), replace(FIT, **change))[:2] == pytest.approx(
        losses(matcher(model), FIT)[:2], rel=1e-4
    )


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mixed_precision(model, kind):
    here = losses(matcher(model), replace(FIT, autocast=kind))
    # A score is a difference of norms of about 32, of which 16-bit predictions keep two or three digits.
    assert here[0] == pytest.approx(losses(matcher(model), FIT)[0], rel=0.3)
    assert all(torch.isfinite(torch.tensor(here)))


def test_a_fit_goes_on_where_it_was_interrupted(model, tmp_path):
    whole, parts = matcher(model), matcher(model)
    whole.fit(GROUPS, config=FIT, progress=False, out=tmp_path / "whole")

    def interrupt(step, loss, record):
        if step == 2 and loss is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts.fit(GROUPS, config=FIT, progress=False, out=tmp_path / "parts", callback=interrupt)
    parts.fit(GROUPS, config=FIT, progress=False, out=tmp_path / "parts")
    pairs = [(group.images[0], text) for group in GROUPS for text in group.texts]
    assert torch.allclose(whole.predict(pairs), parts.predict(pairs), rtol=1e-4, atol=1e-4)


def test_a_compiled_matcher_is_fitted_compiled(model):
    fitted = matcher(model).compile("inductor")
    assert losses(fitted, FIT)[0] == pytest.approx(losses(matcher(model), FIT)[0], rel=1e-3)
    assert fitted.runtime == "inductor"
