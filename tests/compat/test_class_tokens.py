"""The official class-token script by its own names: against the plain loop, with each defect and without any."""

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


def pipeline():
    pipe = tiny_pipeline("sd15")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(torch.float64)
    return pipe


def network():
    layer = nn.Linear(3 * SIDE * SIDE, 3, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(5)) / 20)
    layer.bias.zero_()
    return nn.Sequential(nn.Flatten(), layer).eval()


def guide():
    return guide_of(network(), mean=HALF, std=HALF, labels=LABELS)


def config(folder, **changes):
    fast = {"epoch_size": 2, "gradient_accumulation_steps": 2, "num_of_SD_inference_steps": 2, "num_train_epochs": 3}
    size = {"height": SIDE, "width": SIDE, "output_path": folder, "save_as_full_pipeline": False}
    return RunConfig(**{"class_index": 2, "train": True, "evaluate": False, **fast, **size, "lr": 0.05, **changes})


def learned(folder):
    (bank,) = folder.glob("token/*/*/bank.safetensors")
    return LearnedTokens.load(bank.parent)


def seeded_noise(self, seed):
    return torch.stack([draw_noise(seed, image, (4, 16, 16)) for image in range(self.config.images)])


@pytest.mark.parametrize(
    ("flags", "plain"),
    [
        ({}, {}),
        ({"decay_vocabulary": True, "weight_decay": 2.0}, {"decay_vocabulary": True, "weight_decay": 2.0}),
        # Of one call the texts would have the longest one's length.
        ({"unpadded_prompts": True}, {"padded": False, "batch_size": 1}),
        ({"collapse_changes_seed": True, "lr": 3.0}, {"collapse": True, "learning_rate": 3.0}),
    ],
    ids=lambda value: next(iter(value), "none"),
)
def test_a_token_is_that_of_the_plain_loop(tmp_path, monkeypatch, flags, plain):
    pipe, layers = pipeline(), network()
    monkeypatch.setattr(OfficialLearner, "noise", seeded_noise)
    settings = config(tmp_path, **DEFECTS, **flags)
    run(settings, model=from_pipeline(pipe), classifier=guide())
    tokens = learned(tmp_path)
    made = official._Experiment(settings, from_pipeline(pipe), guide(), reference.TEMPLATES)._settings()
    prompts = Prompts(["tiger cat"], made)
    orders = [[prompts.every(0).index(text) for text in prompts.texts(0, update)] for update in range(3)]
    options = {"steps": 2, "updates": 3, "count": 2, "learning_rate": 0.05, "batch_size": 2, **plain}
    found = reference.learn(pipe, lambda x: layers(2 * x - 1), "Tiger_Cat", 1, orders=orders, **options)
    assert tokens.about["newclas"]["updates"] == len(found.losses)
    assert tokens.about["newclas"]["loss"] == pytest.approx(min(found.losses), rel=1e-6)
    # Vectors are kept as float32, and the learned ones begin as such.
    torch.testing.assert_close(tokens["newclas"].double(), found.vectors[0], rtol=0, atol=1e-5)
    if flags:
        options = {key: value for key, value in options.items() if key not in ("padded", "collapse", "decay_vocabulary")}
        other = reference.learn(pipe, lambda x: layers(2 * x - 1), "Tiger_Cat", 1, orders=orders, **options)
        assert min(map(abs, (a - b for a, b in zip(other.losses[1:], found.losses[1:], strict=True)))) >= 0
        assert max(abs(a - b) for a, b in zip(other.losses, found.losses, strict=True)) > 1e-4
    label = {0: "dog", 1: "Tiger_Cat, feline", 2: "bird-cat"}
    names = {file.name for file in (tmp_path / "img/Tiger_Cat/train").iterdir()}
    assert len(names) == 2 * len(found.losses)
    assert {name.split("_")[0] for name in names} == {str(update) for update in range(len(found.losses))}
    losses = [float(name.rsplit("_", 1)[1].removesuffix(".jpg")) for name in names if name.startswith("0_")]
    assert sum(losses) / 2 == pytest.approx(found.losses[0], rel=1e-5)
    assert all(any(f"_{each}_" in name for each in label.values()) for name in names)
