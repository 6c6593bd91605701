"""A fit under adapters of the user's own, and a second fit over a first."""

import warnings

import pytest
import torch

import dsd_fast as dsd
from dsd_fast.jobs.ids import all_tensors
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.examples import Examples
from dsd_fast.unet.adapters import strengths_summary
from tests.matching.fitting.parts import TEXTS, groups, learned, matcher, pictures, pipeline
from tests.tiny import load_tiny_lora, put_adapter

# Steps too small to be seen beside any number of float32.
STILL = FitConfig(steps=1, learning_rate=1e-40, weight_decay=0.0)
FIT = FitConfig(steps=2, batch_size=2, warmup=0)


@pytest.fixture
def adapted(tmp_path):
    """A pipeline with an adapter "x", half as strong as it was made, in UNet and text encoder."""
    pipe = pipeline()
    load_tiny_lora(pipe, "sd15", tmp_path, adapter_name="x")
    pipe.set_adapters("x", 0.5)
    return pipe


@pytest.mark.parametrize(
    ("method", "adapter"), [("lora", None), ("lora", "x"), ("prompt", None), ("prompt", "x"), ("heads", "x")]
)
def test_an_adapter_counts_as_strong_as_the_matcher_has_it(adapted, adapter, method):
    own = matcher(adapted, adapter)
    images = pictures(1)
    if adapter is not None:
        # The matcher keeps the strength that it was made with.
        want = own.score(images, TEXTS)
        adapted.set_adapters("x", 1.0)
        assert torch.equal(own.score(images, TEXTS), want)
    else:
        want = own.score(images, TEXTS)
    if method == "prompt":
        # Its vectors change the score from the first; what they are made from and scored with is looked at instead.
        vectors = learned(adapted, ("prompt",), adapter=adapter).parameters["prompt"]
        own.fit(groups(), method, config=STILL, progress=False)
        if adapter is None:
            assert torch.equal(own._scorer.prompt, vectors)
        assert [strengths_summary(layers) for layers in own._scorer.engine.adapters.strengths()] == [{"x": [0.5]}] * 2
        return
    own.fit(groups(), method, config=STILL, progress=False)
    # Weights of heads come back from a quotient: to a unit in the last place.
    assert torch.allclose(own.score(images, TEXTS), want, rtol=0 if method == "lora" else 1e-5, atol=0)


def test_the_unconditional_text_is_under_the_matchers_adapters(adapted):
    made = learned(adapted, adapter=())
    examples = Examples(made.scorer, groups())
    wanted = learned(pipeline(), adapter=())
    assert torch.equal(examples.unconditional.states, Examples(wanted.scorer, groups()).unconditional.states)


def test_loading_under_other_adapters_warns(adapted, tmp_path):
    own = matcher(adapted)
    own.fit(groups(), config=FIT, progress=False)
    own.save(tmp_path / "saved")
    want = own.score(pictures(1), TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = dsd.Matcher.load(tmp_path / "saved", dsd.from_pipeline(adapted))
    assert torch.equal(again.score(pictures(1), TEXTS), want)
    adapted.set_adapters("x", 0.25)
    with pytest.warns(UserWarning, match=r"fitted under the adapters .*0\.5.*0\.25"):
        dsd.Matcher.load(tmp_path / "saved", dsd.from_pipeline(adapted))


def test_a_resumed_fit_notices_another_strength(adapted, tmp_path):
    matcher(adapted).fit(groups(), config=FIT, progress=False, out=tmp_path / "out")
    adapted.set_adapters("x", 0.25)
    with pytest.raises(ValueError, match="differs in adapter_strengths, adapters"):
        matcher(adapted).fit(groups(), config=FIT, progress=False, out=tmp_path / "out")


def test_checkpointing_may_change_between_runs(tmp_path):
    own = matcher(pipeline())
    first = own.fit(groups(), config=FIT, progress=False, out=tmp_path)
    again = matcher(pipeline()).fit(
        groups(), config=FitConfig(steps=2, batch_size=2, warmup=0, checkpointing=True), progress=False, out=tmp_path
    )
    assert again == first


def test_a_second_fit_has_its_own_dropout():
    own = matcher(pipeline())
    kept = torch.get_rng_state()
    own.fit(groups(), config=FitConfig(steps=1, batch_size=1, lora_dropout=0.5), progress=False)

    def shares():
        layers = own._scorer.model.unet.modules()
        return {getattr(each, "p", 0.0) for layer in layers for each in getattr(layer, "lora_dropout", {}).values()}

    assert shares() == {0.5}
    own.fit(groups(), config=FitConfig(steps=1, batch_size=1), progress=False)
    assert shares() == {0.0}
    assert torch.equal(torch.get_rng_state(), kept)


def test_a_matcher_of_a_bfloat16_model_loads_as_it_was(tmp_path):
    pipe = pipeline(dtype=torch.bfloat16)
    own = matcher(pipe)
    own.fit(groups(), config=FIT, progress=False)
    own.save(tmp_path)
    again = dsd.Matcher.load(tmp_path, own.model)
    assert torch.equal(again.score(pictures(1), TEXTS), own.score(pictures(1), TEXTS))


def test_a_loss_that_is_no_number_ends_the_fit_by_its_step(tmp_path):
    own = matcher(pipeline())
    before = own.score(pictures(1), TEXTS)
    with pytest.raises(FloatingPointError, match=r"step \d+: the (loss|gradient) is n"):
        own.fit(
            groups(),
            config=FitConfig(steps=20, batch_size=2, learning_rate=1e18, warmup=0),
            progress=False,
            out=tmp_path,
        )
    assert torch.equal(own.score(pictures(1), TEXTS), before)
    assert not (tmp_path / "matcher.json").exists()


def test_a_fit_beside_an_adapter_of_another_kind(tmp_path):
    pipe = pipeline()
    put_adapter(pipe.unet, "loha", "y")
    kept = {name: tensor.clone() for name, tensor in all_tensors(pipe.unet)}
    own = matcher(pipe, "y")
    want = own.score(pictures(1), TEXTS)
    own.fit(groups(), config=STILL, progress=False)
    assert torch.equal(own.score(pictures(1), TEXTS), want)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in all_tensors(pipe.unet))
    own.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = dsd.Matcher.load(tmp_path, dsd.from_pipeline(pipe))
    assert torch.equal(again.score(pictures(1), TEXTS), want)


def test_loading_where_an_adapter_acts_in_other_layers_warns(adapted, tmp_path):
    parts = [{"unet": {"down": 1.0, "mid": one, "up": other}} for one, other in ((0.5, 0.25), (0.25, 0.5))]
    adapted.set_adapters("x", [parts[0]])
    own = matcher(adapted)
    own.fit(groups(), "heads", config=STILL, progress=False)
    own.save(tmp_path / "saved")
    # The first layer is as strong as it was, and so are as many as were.
    adapted.set_adapters("x", [parts[1]])
    with pytest.warns(UserWarning, match="fitted under the adapters .*, in other layers"):
        dsd.Matcher.load(tmp_path / "saved", dsd.from_pipeline(adapted))
