"""Run by a fresh interpreter against an installed wheel: the package's own files, and one score.

Usage: python -P smoke.py FOLDER BACKEND, the folder the wheel was installed into and the implementation that must run.
"""

import sys
from pathlib import Path

import numpy as np

import dsd_fast as dsd
from dsd_fast.cli import main
from dsd_fast.kernels.common import backend

folder = Path(sys.argv[1])
for name in dsd.__all__:
    getattr(dsd, name)
assert callable(main)

image = np.full((64, 64, 3), (200, 30, 30), dtype=np.uint8)
matcher = dsd.Matcher(dsd.load("mini"), dsd.MatchConfig(timesteps=1))
scores = matcher.score([image], ["a red circle", "a blue square"])
assert scores.shape == (1, 2)
assert scores.isfinite().all()
assert backend.last("cross_attention_score") == sys.argv[2]

# An editable install would fill a module that the wheel lacks from the source tree.
files = [
    Path(module.__file__) for name, module in sys.modules.items() if name.startswith("dsd_fast.") and module.__file__
]
assert len(files) > 10
assert [file for file in files if folder not in file.parents] == []
