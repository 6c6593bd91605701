"""Steps of a fit: what they depend on, and which parameters are kept."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig

import dsd_fast as dsd
from dsd_fast.matching import evaluate
from dsd_fast.matching.fitting import loop
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.examples import Examples
from dsd_fast.matching.fitting.run import _groups as examples_of
from dsd_fast.matching.fitting.validation import validate
from dsd_fast.models.mini.scenes import scene
from dsd_fast.training.order import batch_of
from tests.images.files import refilled
from tests.matching.fitting.parts import (
    TEXTS,
    gradients,
    groups,
    largest,
    learned,
    matcher,
    pictures,
    pipeline,
    training,
)


def scenes(count):
    """Pictures of the mini model's own world, each with its caption and two wrong ones."""
    drawn = [scene(seed, objects=2) for seed in range(count)]
    return [(each.image, [*list(each.negatives().values())[:2], each.caption], 2) for each in drawn]


def test_memory_settings_give_the_same_gradient():
    fit = FitConfig(batch_size=3)
    made, found = learned(pipeline(dtype=torch.float64), ("lora", "prompt", "heads"), fit), []
    for own in (fit, replace(fit, micro_batch=1), replace(fit, micro_batch=2, checkpointing=True)):
        loss = float(training(made, own)._gradient())
        found.append((loss, gradients(made)))
    (loss, whole), others = found[0], found[1:]
    for other_loss, other in others:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for name, value in whole.items():
            # Other sums of the same: float64 in the network, float32 in the weights of heads.
            scale = largest(whole) if name != "heads" else float(value.abs().max())
            limit = 1e-10 if value.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(other[name], value, rtol=0, atol=limit * scale)


def test_a_step_depends_on_seed_and_number_alone():
    made = learned(pipeline())

    def gradient(seed, step):
        run = training(made, FitConfig(seed=seed, batch_size=2))
        run.progress.step = step
        run._gradient()
        return torch.cat([value.flatten() for value in gradients(made).values()])

    want = gradient(0, 5)
    torch.manual_seed(1)
    assert torch.equal(gradient(0, 5), want)
    assert not torch.equal(gradient(0, 6), want)
    assert not torch.equal(gradient(1, 5), want)


def test_every_epoch_has_all_groups_in_another_order():
    seen = [number for step in range(15) for number in batch_of(6, 4, step, 0)]
    epochs = [seen[start : start + 6] for start in range(0, 60, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    assert batch_of(6, 4, 0, 1) != batch_of(6, 4, 0, 0)
    # Fewer groups than a step has: it takes them again.
    assert sorted(batch_of(2, 4, 3, 0)) == [0, 0, 1, 1]


def test_dropout_leaves_the_global_generator_alone_and_repeats():
    def fitted(dropout, seed=0):
        own = matcher(pipeline())
        before = torch.get_rng_state()
        own.fit(groups(), config=FitConfig(steps=2, batch_size=2, lora_dropout=dropout, seed=seed), progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        return own.score(pictures(1), TEXTS)

    want = fitted(0.3)
    torch.manual_seed(7)
    assert torch.equal(fitted(0.3), want)
    assert not torch.equal(fitted(0.0), want)


def test_every_step_leaves_out_other_inputs():
    fit = FitConfig(lora_dropout=0.5, batch_size=1)
    made = learned(pipeline(), fit=fit)
    layer = next(m for m in made.scorer.model.unet.modules() if getattr(m, "lora_dropout", None))
    run, seen = training(made, fit, groups()[:1]), []
    layer.lora_dropout["fitted"].register_forward_hook(lambda m, a, out: seen.append(out == 0))
    for step in (0, 0, 1):
        run.progress.step = step
        run._gradient()
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    # Outside of a step nothing is left out.
    assert not layer.lora_dropout["fitted"].training


def test_the_users_own_dropout_stays_as_it_is():
    """It would draw from the global generator, so that no step could be repeated."""
    pipe = pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_dropout=0.5, target_modules=["to_q"], init_lora_weights=False), "mine")
    pipe.unet.eval()
    before, results = torch.get_rng_state(), []
    for _ in range(2):
        own = matcher(pipe)
        own.fit(groups(), config=FitConfig(steps=2, batch_size=1), progress=False)
        results.append(own.score(pictures(1), TEXTS))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


@pytest.fixture
def validated(monkeypatch):
    """A training whose validations give these values: its history, its parameters, and those at each validation."""

    def run(values, fit):
        made, left, seen = learned(pipeline(), ("heads",)), iter(values), []

        def validate(scorer, examples, fit):
            seen.append(made.parameters["heads"].detach().clone())
            return next(left)

        monkeypatch.setattr(loop, "validate", validate)
        history = training(made, fit, validation=Examples(made.scorer, groups())).fit()
        return history, made.parameters["heads"].detach(), seen

    return run


def test_validation_counts_as_evaluate_does():
    own = matcher(pipeline())
    found = validate(own._scorer, Examples(own._scorer, groups()), FitConfig(temperature=0.5))
    result = evaluate(own, groups())
    assert found[0] == result.figures["accuracy"].value
    losses = [
        torch.nn.functional.cross_entropy(torch.from_numpy(each.scores).flatten() / 0.5, torch.tensor(each.label))
        for each in result.results
    ]
    # Scores near 10 that agree to 1e-5 of that, over the temperature.
    assert found[1] == pytest.approx(float(sum(losses) / len(losses)), abs=2e-4)


def test_patience_keeps_the_best_parameters(validated):
    fit = FitConfig(steps=20, batch_size=1, validate_every=2, patience=2, warmup=0)
    history, kept, seen = validated([(0.5, 1.0), (0.75, 0.9), (0.75, 0.95), (0.7, 0.1), (1.0, 0.0)], fit)
    assert (history.steps, history.best_step, history.stopped_early) == (6, 2, True)
    assert [(r.step, r.accuracy, r.validation_loss) for r in history.records] == [
        (0, 0.5, 1.0), (2, 0.75, 0.9), (4, 0.75, 0.95), (6, 0.7, 0.1),
    ]  # fmt: skip
    assert torch.equal(kept, seen[1])
    assert not torch.equal(kept, seen[2])
    # Equal accuracy, less loss is better, and the count of validations begins again.
    history, kept, seen = validated([(0.5, 1.0), (0.4, 0.9), (0.5, 0.9), (0.4, 0.1), (0.5, 0.95)], fit)
    assert (history.steps, history.best_step) == (8, 4)
    assert torch.equal(kept, seen[2])


def test_a_validation_that_is_no_number_is_worse_than_any(validated):
    fit = FitConfig(steps=2, batch_size=1, validate_every=1, warmup=0)
    history, kept, seen = validated([(0.5, math.nan), (0.5, 3.0), (0.5, math.nan)], fit)
    assert history.best_step == 1
    assert torch.equal(kept, seen[1])


def test_held_out_groups_that_training_spoils_leave_the_matcher_as_it_was():
    own = matcher(pipeline())
    before = own.score(pictures(1), TEXTS)
    opposite = [(group.images[0], group.texts[:2], 1 - min(group.label, 1)) for group in groups()[::2]]
    right = [(image, texts, 1 - label) for image, texts, label in opposite]
    fit = FitConfig(steps=12, batch_size=2, validate_every=3, patience=2, learning_rate=3e-2, warmup=0)
    history = own.fit(right, validation=opposite, config=fit, progress=False)
    first, *later = [(r.accuracy, -r.validation_loss) for r in history.records]
    assert all(first > each for each in later)
    assert (history.best_step, history.steps, history.stopped_early) == (0, 6, True)
    assert torch.equal(own.score(pictures(1), TEXTS), before)


def test_buffers_of_examples_may_be_filled_again():
    images = pictures(4)
    examples = [(image, TEXTS, number % 2) for number, image in enumerate(images)]
    refilling = ((image, TEXTS, number % 2) for number, image in enumerate(refilled("array", images)))
    scorer = matcher(pipeline())._scorer
    given, drawn = (Examples(scorer, examples_of("examples", each, scorer.model)) for each in (examples, refilling))
    assert drawn.queries == given.queries
    assert drawn.digest == given.digest
    assert torch.equal(drawn.latents, given.latents)


def test_examples_that_cannot_be_used_are_refused_before_the_first_step(tmp_path):
    own = matcher(pipeline())

    def fit(examples=None, validation=None, **settings):
        config = FitConfig(steps=1, **settings)
        own.fit(groups() if examples is None else examples, validation=validation, config=config, progress=False,
                callback=lambda *_: pytest.fail("a step"))  # fmt: skip

    missing = dsd.Group((tmp_path / "gone.png",), ("a", "b"), 0, id="the one")
    with pytest.raises(dsd.images.ImageError, match=r"gone\.png"):
        fit([missing])
    with pytest.raises(dsd.images.ImageError, match=r"gone\.png"):
        fit(validation=[missing])
    long = "b " * 80
    with pytest.raises(ValueError, match=r"validation\[1\]: text 'b b .* has 82 tokens"):
        fit(validation=[groups()[0], (pictures(1)[0], ["a", long], 0)])
    with pytest.raises(ValueError, match=r"examples\[0\] \(the one\): text 'b b .* has 82 tokens"):
        fit([replace(missing, texts=(long, "b"))])
    with pytest.raises(ValueError, match=r"examples\[1\]: text 'b b .* has 82 tokens"):
        fit([groups()[0], (pictures(2), long, 0)])
    with pytest.raises(ValueError, match="examples: got none"):
        fit([])
    with pytest.raises(ValueError, match="validation: got none"):
        fit(validation=[])
    with pytest.raises(ValueError, match="patience: needs validation"):
        fit(patience=2)
    with pytest.raises(ValueError, match=r"timestep_range: got \(0, 1001\)"):
        fit(timestep_range=(0, 1001))
    with pytest.raises(ValueError, match="label: got 2"):
        fit([(pictures(1)[0], ["a", "b"], 2)])
    for settings, message in (({"attention_weight": 0.0}, "attention_weight is 0"), ({"official": True}, "official")):
        with pytest.raises(ValueError, match=f"method: heads .*{message}"):
            matcher(pipeline(), **settings).fit(groups(), "heads", progress=False)


@pytest.mark.newest
def test_loss_falls_on_the_mini_model():
    own = dsd.Matcher(dsd.load("mini"), dsd.MatchConfig(timesteps=[300, 700]))
    examples = scenes(3)
    fit = FitConfig(steps=20, batch_size=3, warmup=0, validate_every=20)
    first, last = own.fit(examples, validation=examples, config=fit, progress=False).records
    assert last.validation_loss < 0.8 * first.validation_loss
    assert last.accuracy >= first.accuracy


def test_autocast_is_near():
    """The network computes in that type; parameters, scores and loss are float32."""
    examples, found = scenes(2), {}
    for name in (None, "bfloat16", "float16"):
        own = dsd.Matcher(dsd.load("mini"), dsd.MatchConfig(timesteps=[500]))
        losses = []
        fit = FitConfig(steps=2, batch_size=2, autocast=name, loss="margin", margin=5.0)
        own.fit(examples, config=fit, progress=False, callback=lambda step, loss, _, to=losses: to.append(loss))
        found[name] = np.array([loss for loss in losses if loss is not None])
        assert {p.dtype for key, p in own._scorer.model.unet.named_parameters() if ".fitted." in key} == {torch.float32}
    for name in ("bfloat16", "float16"):
        # A score is a difference of norms of 4 × 8 × 8 numbers of size 1, each computed to a few units of the type's
        # last place.
        limit = 4 * 16 * torch.finfo(getattr(torch, name)).eps
        difference = np.abs(found[name] - found[None]).max()
        assert 0 < difference <= limit
