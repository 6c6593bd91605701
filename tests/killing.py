"""What learns into a folder, killed at chosen moments and gone on with, each time in a new process."""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def kill() -> None:
    """End this process at once, as a kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_new_process(learn: Callable[[Path, object], None], folder: Path, moment: object) -> int:
    """The signal that ended it, or 0."""
    child = os.fork()
    if not child:
        try:
            learn(folder, moment)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def tell(
    learn: Callable[[Path, object], None], moments: Sequence[object], digests: Callable[[Path], dict[str, str]]
) -> None:
    """Print a JSON object: how each process ended, and the digests of the files of a killed and of a whole learning."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    ends = [in_new_process(learn, folder / "killed", moment) for moment in moments]
    ends.append(in_new_process(learn, folder / "whole", None))
    killed, whole = (digests(folder / name) for name in ("killed", "whole"))
    print(json.dumps({"ends": ends, "killed": killed, "whole": whole}))
