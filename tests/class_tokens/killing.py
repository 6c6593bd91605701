"""A learning that is killed at chosen moments and goes on, each time in a new process; run by test_learner.

Prints a JSON object: how each process ended, and the digests of the files it left.
"""

import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dsd_fast.class_tokens.learning import CHECKPOINT
from tests.class_tokens.parts import CONFIG, learn, model

# An update's event, the write of a file, or nothing.
MOMENTS = (("ring", 1), CHECKPOINT, ("dog", 1), "bank.safetensors", None)


def learned(folder: Path, moment: object) -> None:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

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


def in_new_process(folder: Path, moment: object) -> int:
    """The signal that ended it, or 0."""
    child = os.fork()
    if not child:
        try:
            learned(folder, moment)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def files(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ends = [in_new_process(folder / "killed", moment) for moment in MOMENTS]
    ends.append(in_new_process(folder / "whole", None))
    print(json.dumps({"ends": ends, "killed": files(folder / "killed"), "whole": files(folder / "whole")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
