"""README's code runs as it stands."""

import re

from tests.repository.processes import run_python
from tests.repository.source import ROOT


def test_examples_run(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 4
    printed = []
    for number, example in enumerate(examples):
        (tmp_path / f"example{number}.py").write_text(example)
        done = run_python(["-W", "error::UserWarning", f"example{number}.py"], cwd=tmp_path, path=[ROOT])
        printed.append(done.stdout)
    assert (tmp_path / "fitted" / "matcher.json").is_file()
    scores = [float(line.split()[0]) for line in printed[0].splitlines()]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert re.fullmatch(r"(up-level\S+ \(1, 2, \d+, \d+, \d+\)\n)+", printed[2])
    assert re.fullmatch(r"tensor\(\[ *[\d.]+, *[\d.]+\]\)\n", printed[3])
