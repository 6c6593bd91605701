"""The official class-token script by its own names: against the plain loop, with each defect and without any."""

import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from dsd_fast.class_tokens.prompts import Prompts
from dsd_fast.compat import RunConfig, run
from dsd_fast.compat import class_tokens as official
from dsd_fast.compat.class_token_defects import OfficialLearner, mean_pooled, unfiltered
from dsd_fast.engine.guides import guide_of
from dsd_fast.engine.tokens import LearnedTokens
from dsd_fast.models import from_pipeline
from dsd_fast.reference import class_tokens as reference
from dsd_fast.reference.inputs import draw_noise
from tests.tiny import tiny_pipeline

LABELS = ("dog", "Tiger_Cat, feline", "bird/cat")
SIDE, HALF = 64, (0.5, 0.5, 0.5)
DEFECTS = {"clip_before_backward": True, "save_after_step": True}


@functools.cache
def pipeline():
    """A pipeline that nothing here changes."""
    pipe = tiny_pipeline("sd15")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(torch.float64)
    return pipe


class Jumping(nn.Sequential):
    """What it says of the second update's two images is far off."""

    seen = 0

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x) + (x.new_tensor([20.0, 0, 0]) if 2 < self.seen <= 4 else 0)


def network(kind=nn.Sequential):
    layer = nn.Linear(3 * SIDE * SIDE, 3, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(5)) / 20)
    layer.bias.zero_()
    return kind(nn.Flatten(), layer).eval()


def guide(kind=nn.Sequential):
    return guide_of(network(kind), mean=HALF, std=HALF, labels=LABELS)


def config(folder, **changes):
    fast = {"epoch_size": 2, "gradient_accumulation_steps": 2, "num_of_SD_inference_steps": 2, "num_train_epochs": 2}
    size = {"height": SIDE, "width": SIDE, "output_path": folder}
    fast |= {"gradient_checkpointing": False, "save_as_full_pipeline": False}
    return RunConfig(**{"class_index": 2, "train": True, "evaluate": False, **fast, **size, "lr": 0.05, **changes})


def learned(folder):
    (bank,) = folder.glob("token/*/*/bank.safetensors")
    return LearnedTokens.load(bank.parent)


def seeded_noise(self, seed):
    return torch.stack([draw_noise(seed, image, (4, 16, 16)) for image in range(self.config.images)])


@pytest.mark.parametrize(
    ("flags", "plain"),
    [
        (
            {"decay_vocabulary": True, "gradient_checkpointing": True, "weight_decay": 2.0},
            {"decay_vocabulary": True, "weight_decay": 2.0},
        ),
        ({"unpadded_prompts": True}, {"padded": False}),
        ({"collapse_changes_seed": True, "num_train_epochs": 3}, {"collapse": True, "updates": 3}),
        # The first image's gradient is clipped to some of its norm, the second's is whole.
        ({"max_grad_norm": "1e-2"}, {"clip_before": 1e-2}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_token_is_that_of_the_plain_loop(tmp_path, monkeypatch, flags, plain):
    pipe, kind = pipeline(), Jumping if "collapse" in plain else nn.Sequential
    monkeypatch.setattr(OfficialLearner, "noise", seeded_noise)
    settings = config(tmp_path, **DEFECTS, **flags)
    run(settings, model=from_pipeline(pipe), classifier=guide(kind))
    tokens = learned(tmp_path)
    made = official._Experiment(settings, from_pipeline(pipe), guide(), reference.TEMPLATES)._settings()
    assert made.templates == tuple(reference.TEMPLATES[:2])
    prompts = Prompts(["tiger cat"], made)
    orders = [[prompts.every(0).index(text) for text in prompts.texts(0, update)] for update in range(3)]
    options = {"steps": 2, "updates": 2, "count": 2, "learning_rate": 0.05, "clip_before": 1.0, "orders": orders}

    def plainly(**changes):
        layers = network(kind)
        return reference.learn(pipe, lambda x: layers(2 * x - 1), "Tiger_Cat", 1, **{**options, **changes})

    found = plainly(**plain)
    assert tokens.about["newclas"]["updates"] == len(found.losses)
    assert tokens.about["newclas"]["loss"] == pytest.approx(min(found.losses), rel=1e-6)
    # Vectors are kept as float32, and the learned ones begin as such.
    torch.testing.assert_close(tokens["newclas"].double(), found.vectors[0], rtol=0, atol=1e-5)
    others = plainly(updates=plain.get("updates", 2)).losses
    assert max(abs(a - b) for a, b in zip(others, found.losses, strict=True)) > 1e-4
    label = {0: "dog", 1: "Tiger_Cat, feline", 2: "bird-cat"}
    names = {file.name for file in (tmp_path / "img/Tiger_Cat/train").iterdir()}
    assert len(names) == 2 * len(found.losses)
    assert {name.split("_")[0] for name in names} == {str(update) for update in range(len(found.losses))}
    losses = [float(name.rsplit("_", 1)[1].removesuffix(".jpg")) for name in names if name.startswith("0_")]
    assert sum(losses) / 2 == pytest.approx(found.losses[0], rel=1e-5)
    assert all(any(f"_{each}_" in name for each in label.values()) for name in names)


def test_the_defects_that_need_no_loop(tmp_path):
    model, updates = from_pipeline(pipeline()), {"num_train_epochs": 1, "weight_decay": 0.0}
    start = (
        model.text_encoders[0]
        .get_input_embeddings()
        .weight[model.tokenizers[0].encode("a", add_special_tokens=False)[0]]
        .float()
    )
    moved = []
    for number, flags in enumerate(
        (
            {},
            {"save_after_step": True, "max_grad_norm": "1e-13"},
            {"save_after_step": True, "max_grad_norm": "1e-13", "clip_before_backward": True},
        )
    ):
        run(config(tmp_path / str(number), **updates, **flags), model=model, classifier=guide())
        moved.append(float((learned(tmp_path / str(number))["newclas"][0] - start).abs().max()))
    # AdamW's first step is the learning rate, unless ε is more than the gradient.
    assert moved[0] == 0
    assert 0 < moved[1] < 1e-5
    assert moved[2] == pytest.approx(0.05, rel=1e-3)


def test_evaluation_shows_what_stock_images_are_taken_for(tmp_path, monkeypatch):
    pipe, layers = pipeline(), network()
    monkeypatch.setitem(official._SHOWING, "steps", 2)
    settings = config(tmp_path, evaluate=True, test_size=2, num_train_epochs=1, save_as_full_pipeline=True, exp_id="x")
    shares = run(settings, model=from_pipeline(pipe), classifier=guide())
    name = "x_2.1_2_0.05_35_3_15_Tiger_Cat"
    stock = type(pipe).from_pretrained(tmp_path / "pipeline_token/Tiger_Cat" / name, torch_dtype=torch.float64)
    stock.set_progress_bar_config(disable=True)
    expected, files = {}, set()
    for word in ("newclas", "a"):
        outputs = []
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            options = {"num_inference_steps": 2, "generator": generator, "output_type": "pt"}
            image = stock(f"A photo of {word} tiger cat", **options).images
            outputs.append(int(layers(2 * image - 1).argmax()))
            label = LABELS[outputs[-1]].replace("/", "-")
            told = f"a_tiger cat_{'correct' if outputs[-1] == 1 else 'wrong'}"
            files.add(
                f"{seed}_{name.removesuffix('_Tiger_Cat')}_{label}.jpg" if word == "newclas" else f"{seed}_{told}.jpg"
            )
        expected[word] = outputs.count(1) / 2
    assert shares == expected
    folder = tmp_path / "img/Tiger_Cat/eval"
    assert {file.name for file in folder.iterdir()} == files
    with Image.open(next(folder.iterdir())) as picture:
        assert picture.size == (SIDE, SIDE)
    again = replace(settings, train=False, skip_exists=True)
    assert run(again, model=from_pipeline(pipe), classifier=guide()) == {"newclas": shares["newclas"]}
    off = replace(settings, train=False, baseline_label_off_by_one=True, test_size=1)
    run(off, model=from_pipeline(pipe), classifier=guide())
    (told,) = folder.glob("0_a_*")
    assert told.stem.endswith("correct" if outputs[0] == 2 else "wrong")
    with pytest.raises(FileNotFoundError, match="has no token; learn it first"):
        run(replace(again, class_index=1), model=from_pipeline(pipe), classifier=guide())


def test_learning_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    model, write, written = from_pipeline(pipeline()), official._write, []
    run(config(tmp_path / "whole"), model=model, classifier=guide())

    def interrupted(file, pixels):
        written.append(file)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(file, pixels)

    monkeypatch.setattr(official, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path / "parts"), model=model, classifier=guide())
    run(config(tmp_path / "parts"), model=model, classifier=guide())
    assert len(written) == 3 + 2
    whole, parts = learned(tmp_path / "whole"), learned(tmp_path / "parts")
    assert torch.equal(whole["newclas"], parts["newclas"])
    folder = "img/Tiger_Cat/train"
    assert sorted(f.name for f in (tmp_path / "whole" / folder).iterdir()) == sorted(
        f.name for f in (tmp_path / "parts" / folder).iterdir()
    )
    run(replace(config(str(tmp_path / "parts")), skip_exists=True), model=model, classifier=guide())
    assert len(written) == 5


def test_noise_is_the_official_generators(tmp_path):
    made = official._Experiment(config(tmp_path), from_pipeline(pipeline()), guide(), reference.TEMPLATES)
    learner = OfficialLearner(made.model, made.guide, made._settings(), 1, made.config.defects())
    generator = torch.Generator().manual_seed(35)
    expected = [torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2)]
    assert torch.equal(learner._latents, torch.cat(expected))
    assert learner.config.norm_clamp is None


def test_official_classifiers():
    settings = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, patch_size=32, num_labels=3
    )
    vit = ViTForImageClassification(settings).eval()
    made = guide_of(vit, mean=HALF, std=HALF, size=(224, 224))
    mean_pooled(made)
    pixels = 2 * torch.rand(1, 3, 300, 280, generator=torch.Generator().manual_seed(0)) - 1
    official_guide = unfiltered(made, "inat")
    resized = F.interpolate(pixels / 2 + 0.5, (240, 224), mode="bicubic")[..., 8:232, :]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        hidden = vit.vit((resized - mean[:, None, None]) / std[:, None, None], output_hidden_states=True).hidden_states[
            -1
        ]
        expected = vit.classifier(vit.vit.layernorm.forward(hidden[:, 1:].mean(1)))
        got = official_guide.logits(pixels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert official_guide.settings() != made.settings()
    assert unfiltered(made, "inet").settings() != official_guide.settings()
    assert not math.isclose(float((made.logits(pixels) - got).abs().max()), 0, abs_tol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_index": 0}, "class_index: got 0, expected an integer of at least 1"),
        ({"class_index": 4}, "class_index: got 4, expected 1 to 3, one of the labels"),
        ({"batch_size": 2}, "batch_size: got 2, expected 1, as no other works officially"),
        ({"epoch_size": 3}, "gradient_accumulation_steps: got 2 with an epoch_size of 3, expected the same"),
        ({"number_of_prompts": 4}, "number_of_prompts: got 4, expected at most 3, the templates"),
        ({"betas": (2, 3)}, r"betas: got \(2, 3\), expected two numbers from 0 to below 1"),
        ({"weight_decay": -1}, "weight_decay: got -1, expected a number of at least 0"),
        ({"output_path": 3}, "output_path: got 3, expected a path"),
        ({"max_grad_norm": "no"}, "max_grad_norm: got 'no', expected a number above 0, or its text"),
        ({"classifier": "vit"}, "classifier: got 'vit', expected one of inet, inat, cub"),
        ({"placeholder_token": "dog</w>"}, "dog"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(config(tmp_path, **changes), model=from_pipeline(pipeline()), classifier=guide())
    assert not list(tmp_path.iterdir())
