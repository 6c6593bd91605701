"""README's code runs as it stands."""

import re

from tests.repository.processes import run_python
from tests.repository.source import ROOT


def test_example_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    printed = run_python([tmp_path / "example.py"], cwd=tmp_path, path=[ROOT]).stdout.splitlines()
    scores = [float(line.split()[0]) for line in printed]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
