"""No code of the repository runs what a file or a string says (promise 30)."""

import pytest

from tests.repository.safety import torch_loads, violations
from tests.repository.source import ROOT, TREES, python_files

BAD = {
    "import pickle": ["line 1: import of pickle"],
    "import torch, _pickle as p": ["line 1: import of _pickle"],
    "from cloudpickle import loads": ["line 1: import of cloudpickle"],
    "def f():\n    import dill.source": ["line 2: import of dill.source"],
    "import joblib\njoblib.load(path)": ["line 2: joblib.load loads pickles"],
    "from joblib import load": ["line 1: joblib.load loads pickles"],
    "import pandas as pd\npd.read_pickle(path)": ["line 2: pandas.read_pickle loads pickles"],
    "import torch\ntorch.load(path)": ["line 2: torch.load without weights_only=True"],
    "import torch as t\nt.load(path, weights_only=flag)": ["line 2: weights_only is not True"],
    "from torch import load as read\nread(path)": ["line 2: torch.load without weights_only=True"],
    "import torch\ntorch.serialization.load(path)": ["line 2: torch.load without weights_only=True"],
    "import torch\ntorch.load(path, **{'weights_only': False})": [
        "line 2: torch.load without weights_only=True",
        "line 2: weights_only is not True",
    ],
    "eval('1 + 1')": ["line 1: builtins.eval evaluates text"],
    "run = exec": ["line 1: builtins.exec executes text"],
    "import builtins\nbuiltins.exec(text)": ["line 2: builtins.exec executes text"],
    "import subprocess\nsubprocess.run(command, shell=True)": ["line 2: shell is not False"],
    "import subprocess as s\ns.getoutput(command)": ["line 2: subprocess.getoutput runs a shell"],
    "import os\nos.system(command)": ["line 2: os.system runs a shell"],
    "from os import popen as run": ["line 1: os.popen runs a shell"],
    "load(name, trust_remote_code=True)": ["line 1: trust_remote_code is not False"],
    "load(name, trust_remote_code=ask())": ["line 1: trust_remote_code is not False"],
    "import numpy as np\nnp.load(path, allow_pickle=True)": ["line 2: allow_pickle is not False"],
}

GOOD = [
    "model.eval()",
    "import torch\ntorch.load(path, weights_only=True)",
    "from safetensors.torch import load\nload(data)",
    "import subprocess\nsubprocess.run([command], shell=False)",
    "load(name, trust_remote_code=False)",
    "import numpy as np\nnp.load(path)",
    "x = 'import pickle'",
]


@pytest.mark.parametrize("source", BAD, ids=range(len(BAD)))
def test_violations_finds(source):
    assert violations(source) == BAD[source]


@pytest.mark.parametrize("source", GOOD)
def test_violations_passes(source):
    assert violations(source) == []


# May call torch.load, with weights_only=True: the official LoRA checkpoints are pickles.
READS_PICKLES = ["dsd_fast/compat/attn_procs.py"]


def test_pickles_are_read_in_one_place():
    files = python_files("dsd_fast", "kernels")
    assert [str(file.relative_to(ROOT)) for file in files if torch_loads(file.read_text())] == READS_PICKLES


def test_torch_loads_finds_calls():
    assert torch_loads("from torch import load as read\nread(path, weights_only=True)") == 1
    assert torch_loads("from safetensors.torch import load\nload(data)") == 0


def test_repository_is_safe():
    files = [*python_files(*TREES), ROOT / "setup.py"]
    assert ROOT / "kernels/common/backend.py" in files
    assert ROOT / "dsd_fast/__init__.py" in files
    found = {str(file.relative_to(ROOT)): violations(file.read_text()) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}
