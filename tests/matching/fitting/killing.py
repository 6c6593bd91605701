"""A fit that is killed at chosen moments and goes on, each time in a new process; run by test_resume."""

import hashlib
import os
from pathlib import Path

import dsd_fast as dsd
from dsd_fast.jobs import read_tensors
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.matching.fitting.files import LORA, MATCHER
from dsd_fast.training import CHECKPOINT
from tests.killing import kill, tell
from tests.matching.fitting.parts import groups, matcher, pipeline

FIT = FitConfig(steps=3, batch_size=2, validate_every=2, save_every=0, lora_dropout=0.1, warmup=0)
MOMENTS = (("step", 1), ("file", CHECKPOINT), ("look", 2), ("file", MATCHER), None)


def fit(folder: Path, moment: tuple | None) -> None:
    def callback(step, loss, record):
        if moment == ("step" if record is None else "look", step):
            kill()

    rename = os.replace

    def replace(source, target):
        if moment == ("file", Path(target).name):
            kill()
        rename(source, target)

    os.replace = replace
    # From its second look on every look is worse: the best parameters are not the last.
    wrong = [dsd.Group(group.images, group.texts, 1 - group.label) for group in groups()[1:]]
    own = matcher(pipeline())
    own.fit(groups(), ("lora", "heads"), validation=wrong, config=FIT, out=folder, callback=callback, progress=False)


def files(folder: Path) -> dict[str, str]:
    # Only the order of what the LoRA's header says differs from one writing to the next.
    found = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != LORA}
    tensors, _ = read_tensors(folder / LORA)
    found[LORA] = b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


if __name__ == "__main__":
    tell(fit, MOMENTS, files)
