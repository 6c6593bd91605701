"""A small data set of the mini model's scenes, and a run on it that takes seconds."""

from dataclasses import replace
from itertools import count
from pathlib import Path

from PIL import Image

from dsd_fast.class_tokens.cdm import CdmConfig
from dsd_fast.class_tokens.zsl import ZslConfig
from dsd_fast.class_tokens.zsl.config import TOKENS
from dsd_fast.generation import GenerateConfig
from dsd_fast.models.mini.scenes import scene

CLASSES = ("blue circle", "cyan square", "green cross", "purple ring", "red circle", "yellow triangle")
UNSEEN = ("cyan square", "red circle")
IMAGES = 3
STEP = {"steps": 1, "guidance": 1.0, "scheduler": "ddim"}


def draw(root: Path) -> None:
    """Of each class some single objects, in a folder with its name."""
    left = dict.fromkeys(CLASSES, IMAGES)
    for seed in count():
        drawn = scene(seed, objects=1)
        name = f"{drawn.objects[0].colour} {drawn.objects[0].shape}"
        if left.get(name):
            left[name] -= 1
            file = root / name.replace(" ", "_") / f"{left[name]}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn.image).save(file)
        if not any(left.values()):
            return


def config(root: Path, out: Path, **more) -> ZslConfig:
    """A run with every stage, two of γ, and as little of each as there can be."""
    settings = {
        "unseen": tuple(name.replace(" ", "_") for name in UNSEEN),
        "validation": 2,
        "cdm": CdmConfig(widths=(16,), steps=4),
        "tokens": replace(TOKENS, images=2, updates=2, learning_rate=0.05, save_every=0, **STEP),
        "gammas": (0.1, 1.0),
        "generate": GenerateConfig(**STEP),
        "per_class": 2,
        "ensemble": ("a {} seen from afar",),
        "counts": (1, 5),
    }
    return ZslConfig(out=out, images=root, **{**settings, **more})
