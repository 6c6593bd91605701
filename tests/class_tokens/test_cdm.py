"""The category discrimination model, against the plain loop, finite differences, and classes that it has not seen."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dsd_fast as dsd
from dsd_fast.class_tokens.cdm import CategoryDiscriminator, CdmConfig, encoder_of
from dsd_fast.engine.clip import ClipSpace
from dsd_fast.engine.network import vision_network
from dsd_fast.generation.guides import AcceptClassifier
from dsd_fast.generation.rows import GenerateRow
from dsd_fast.jobs import write_tensors
from dsd_fast.models.mini.scenes import EVAL_SEED, scene

CONFIG = CdmConfig(templates=("one {}", "a {class}"), widths=(12,), dropout=0.0, steps=7, batch_size=4, save_every=0)
SEEN = ["red circle", "blue ring", "green cross"]


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(scope="module")
def encoder():
    """A module in float64."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.Tanh(), nn.AvgPool2d(7), nn.Flatten()).double().eval()
    return vision_network(module, size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def examples():
    draw = np.random.default_rng(0)
    return draw.normal(3, 2, (10, 5)).astype(np.float32), draw.integers(0, 3, 10)


@pytest.fixture(scope="module")
def fitted(model, encoder, examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("fits") / "cdm"
    return CategoryDiscriminator.fit(encoder, *examples, SEEN, model, CONFIG, out=out), out


@torch.no_grad()
def texts(model, names, templates=CONFIG.templates):
    """Prototypes, one text after the other."""
    space = ClipSpace(model)
    rows = [sum(space.of_texts([text.format(name, **{"class": name})]) for text in templates) for name in names]
    return F.normalize(torch.cat(rows), dim=-1)


def mlp(tensors):
    """What the tensors of a file compute."""
    weights, biases = ([tensors[f"layers.{n}.{kind}"] for n in (0, 3)] for kind in ("weight", "bias"))

    def run(x):
        hidden = F.gelu((x - tensors["mean"]) / tensors["scale"] @ weights[0].T + biases[0])
        return F.normalize(hidden @ weights[1].T + biases[1], dim=-1)

    return run, [*weights, *biases]


def test_training_is_the_plain_loop(model, encoder, examples, fitted):
    x, y = (torch.from_numpy(each) for each in examples)
    # The first weights are those of a fit whose rate is as good as 0.
    first = CategoryDiscriminator.fit(encoder, x, y, SEEN, model, replace(CONFIG, learning_rate=1e-30, steps=1))
    tensors = {name: value.clone() for name, value in first._network.state_dict().items()}
    torch.testing.assert_close(tensors["mean"], x.mean(0))
    torch.testing.assert_close(tensors["scale"], x.var(0, correction=0).mean().sqrt())
    run, parameters = mlp(tensors)
    for each in parameters:
        each.requires_grad_()
    groups = [{"params": [each], "weight_decay": CONFIG.weight_decay * (each.ndim == 2)} for each in parameters]
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.learning_rate)
    prototypes = texts(model, SEEN)
    for step in range(CONFIG.steps):
        # Ten examples are three batches of an epoch, the last one of two.
        order = np.random.default_rng((CONFIG.seed, step // 3)).permutation(10)[step % 3 * 4 :][:4]
        F.cross_entropy(run(x[order]) @ prototypes.T / CONFIG.temperature, y[order]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.learning_rate * (1 + np.cos(np.pi * step / CONFIG.steps)) / 2
        optimizer.step()
        optimizer.zero_grad()
    for name, value in fitted[0]._network.state_dict().items():
        # Adam's first steps are signs of gradients, over a denominator of eps where these are rounding; float32.
        torch.testing.assert_close(value, tensors[name].detach(), rtol=0, atol=1e-5)


def test_a_guide_is_the_cosine_with_names_it_has_not_seen(model, encoder, fitted):
    cdm, unseen = fitted[0], ["red ring", "blue cross"]
    guide = cdm.guide(unseen)
    pixels = (torch.rand(2, 3, 20, 20, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    run, _ = mlp({name: value.double() for name, value in cdm._network.state_dict().items()})
    want = run(encoder(pixels)) @ texts(model, unseen).double().T / CONFIG.temperature
    got = guide.logits(pixels)
    assert (guide.labels, guide.count, got.dtype) == (tuple(unseen), 2, torch.float64)
    # The texts in another order of sums, in float32, over the temperature.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(cdm.guide(unseen, 1).logits(pixels), got * CONFIG.temperature)
    features = encoder(pixels).detach()
    torch.testing.assert_close(guide.of_features(features), got.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(cdm.embed(features), run(features).float(), rtol=0, atol=1e-5)
    got[:, 0].sum().backward()
    direction = torch.randn_like(pixels)
    with torch.no_grad():
        higher, lower = (guide.logits(pixels + step * direction)[:, 0].sum() for step in (1e-5, -1e-5))
    assert float((pixels.grad * direction).sum()) == pytest.approx(float(higher - lower) / 2e-5, rel=1e-6)
    with pytest.raises(ValueError, match="temperature: got 0, expected a number above 0"):
        cdm.guide(unseen, 0)
    with pytest.raises(ValueError, match="classes: 'a' is there more than once"):
        cdm.guide(["a", "a"])


def test_what_is_saved_is_what_was_made(model, encoder, examples, fitted, tmp_path):
    cdm, out = fitted
    content = (out / "cdm.safetensors").read_bytes()
    loaded = CategoryDiscriminator.load(out, model, encoder)
    assert (loaded.config, loaded.classes) == (replace(CONFIG, save_every=60.0), SEEN)
    assert loaded.settings() == cdm.settings() == json.loads(json.dumps(cdm.settings()))
    told = [cdm.guide(SEEN).settings(), cdm.guide(SEEN, 1).settings(), cdm.guide(SEEN[:2]).settings()]
    assert loaded.guide(SEEN).settings() == told[0]
    assert told[0] != told[1] != told[2] != told[0]
    features = torch.from_numpy(examples[0])
    assert torch.equal(loaded.embed(features), cdm.embed(features))
    # The same call again takes no step; another one is refused.
    again = CategoryDiscriminator.fit(encoder, *examples, SEEN, model, replace(CONFIG, save_every=9), out=out)
    assert again.settings() == cdm.settings()
    assert (out / "cdm.safetensors").read_bytes() == content
    for changed, names in (
        ({"config": replace(CONFIG, dropout=0.25)}, "config"),
        ({"classes": ["a", *SEEN[1:]]}, "classes"),
        ({"features": examples[0] + 1}, "examples"),
    ):
        given = {"features": examples[0], "labels": examples[1], "classes": SEEN, "config": CONFIG, **changed}
        with pytest.raises(ValueError, match=f"which differs in {names};"):
            CategoryDiscriminator.fit(encoder, model=model, out=out, **given)
    with pytest.raises(ValueError, match="was made with another encoder"):
        CategoryDiscriminator.load(out, model)
    other = copy.deepcopy(model.clip)
    other.text_model.embeddings.token_embedding.weight[0] += 1
    with pytest.raises(ValueError, match="was made with another clip"):
        CategoryDiscriminator.load(out, dsd.from_pipeline(model.to_pipeline(), clip=other), encoder)
    with pytest.raises(ValueError, match=r"folder: .*nowhere.cdm.safetensors does not exist"):
        CategoryDiscriminator.load(out / "nowhere", model)
    (tmp_path / "cdm.safetensors").write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"folder: .*cdm.safetensors is no category discrimination model"):
        CategoryDiscriminator.load(tmp_path, model, encoder)
    write_tensors(tmp_path / "cdm.safetensors", {"weight": features})
    with pytest.raises(ValueError, match=r"is no category discrimination model \('config'\)"):
        CategoryDiscriminator.load(tmp_path, model, encoder)


def test_an_interrupted_fit_goes_on_where_it_was(model, encoder, examples, fitted, tmp_path):
    config = replace(CONFIG, dropout=0.5, steps=6)
    whole = CategoryDiscriminator.fit(encoder, *examples, SEEN, model, config)
    cdm = CategoryDiscriminator(model, encoder, SEEN, config, 5)
    steps = []

    def interrupt(*_):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt

    hook = cdm._network.register_forward_pre_hook(interrupt)
    x, y = (torch.from_numpy(each) for each in examples)
    with pytest.raises(KeyboardInterrupt):
        cdm._train(x, y, tmp_path)
    hook.remove()
    resumed = CategoryDiscriminator.fit(encoder, *examples, SEEN, model, config, out=tmp_path)
    assert resumed.settings() == whole.settings() != fitted[0].settings()


def test_what_is_learned_of_some_classes_tells_others(model):
    scenes = [scene(EVAL_SEED + number, objects=1) for number in range(240)]
    names = [f"{each.objects[0].colour} {each.objects[0].shape}" for each in scenes]
    unseen = sorted(set(names))[::5]
    seen = [name for name in sorted(set(names)) if name not in unseen]
    config = CdmConfig(templates=("one {}",))
    encoder = encoder_of(config, model)
    known, others = ([n for n, name in enumerate(names) if name in group] for group in (seen, unseen))
    features = encoder.of_images([scenes[n].image for n in known])
    cdm = CategoryDiscriminator.fit(encoder, features, [seen.index(names[n]) for n in known], seen, model, config)
    accept = AcceptClassifier(cdm.guide(unseen), unseen, 0.5)
    verdicts = accept(np.stack([scenes[n].image for n in others]), [GenerateRow("a", label=names[n]) for n in others])
    # One of six or so classes; its CLIP was trained on such scenes.
    assert np.mean([each.accepted for each in verdicts]) > 0.8


def test_what_cannot_be_trained_on_is_refused(model, encoder, examples):
    x, y = examples
    for changed, wrong in (
        ({"features": x[0]}, r"features: got shape \(5,\), expected finite numbers \(N, D\)"),
        ({"features": x * np.nan}, r"features: got shape \(10, 5\), expected finite"),
        ({"features": x[:0], "labels": y[:0]}, "features: got shape"),
        ({"labels": y[:9]}, r"labels: got torch.int64 of shape \(9,\), expected \(10,\) positions from 0 to 2"),
        ({"labels": y + 1}, "labels: got"),
        ({"labels": y / 2}, "labels: got torch.float64"),
        ({"classes": ["a"], "labels": y * 0}, "classes: got one, which there is nothing to tell from"),
        ({"classes": ["a", "b", "a"]}, "classes: 'a' is there more than once"),
        ({"model": dsd.from_pipeline(model.to_pipeline())}, "has no CLIP"),
    ):
        given = {"features": x, "labels": y, "classes": SEEN, "model": model, **changed}
        with pytest.raises(ValueError, match=wrong):
            CategoryDiscriminator.fit(encoder, config=CONFIG, **given)
    for options, wrong in (
        ({"widths": (0,)}, r"widths: got \(0,\), expected integers of at least 1"),
        ({"dropout": 1}, "dropout: got 1, expected a number from 0 to below 1"),
        ({"templates": "one"}, "templates: got 'one'"),
        ({"encoder": ""}, "encoder: got ''"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
    ):
        with pytest.raises(ValueError, match=wrong):
            CdmConfig(**options)
