"""A learning that is killed at chosen moments and goes on, each time in a new process; run by test_learner."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import torch

from dsd_fast.class_tokens.learning import CHECKPOINT
from tests.class_tokens.parts import CONFIG, learn, model
from tests.killing import kill, tell

# An update's event, the write of a file, or nothing.
MOMENTS = (("ring", 1), CHECKPOINT, ("dog", 1), "bank.safetensors", None)


def learned(folder: Path, moment: object) -> None:
    def callback(event):
        if moment == (event.name, event.update):
            kill()

    rename = os.replace

    def replacing(source, target):
        if moment == Path(target).name:
            kill()
        rename(source, target)

    os.replace = replacing
    config = replace(
        CONFIG, templates=("one {}",), steps=1, gradient_steps=1, scheduler="ddim", together=2, updates=2, keep="best"
    )
    learn(config, own=model("sd15", torch.float32), out=folder, callback=callback)


def files(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


if __name__ == "__main__":
    tell(learned, MOMENTS, files)
