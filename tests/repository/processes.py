"""Fresh Python processes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_python(
    arguments: Sequence[str | Path], *, cwd: Path, path: Sequence[Path] = (), check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter in `cwd` with `path` as its PYTHONPATH; with `check`, a failure shows its output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
