"""README's code runs as it stands."""

import re

from tests.repository.processes import run_python
from tests.repository.source import ROOT


def test_examples_run(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 7
    for number, example in enumerate(examples):
        (tmp_path / f"example{number}.py").write_text(example)
    # Each by itself, with names of its own, in a process that imports what they import once.
    code = "import runpy\nfor number in range(7):\n    runpy.run_path(f'example{number}.py')\n    print('THE END')"
    done = run_python(["-W", "error::UserWarning", "-c", code], cwd=tmp_path, path=[ROOT])
    printed = done.stdout.split("THE END\n")
    assert (tmp_path / "fitted" / "matcher.json").is_file()
    scores = [float(line.split()[0]) for line in printed[0].splitlines()]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert re.fullmatch(r"(up-level\S+ \(1, 2, \d+, \d+, \d+\)\n)+", printed[2])
    assert printed[3] == "(64, 64)\n" * 2
    assert {file.name for file in (tmp_path / "tokens").iterdir()} >= {"red-circle-token.safetensors", "tokens.json"}
    assert re.fullmatch(r"(\(64, 64\)\n){2}tensor\(\[\[[\d.]+, *[\d.]+\]\]\)\n", printed[5])
    assert (tmp_path / "prompts.safetensors").is_file()
    assert re.fullmatch(r"tensor\(\[ *[\d.]+, *[\d.]+\]\)\n", printed[6])
