"""docs/promises.md names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_named_test_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "promises.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert (ROOT / file).is_file(), file
        if test:
            tree = ast.parse((ROOT / file).read_text())
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_all_thirty_five_promises_are_there():
    rows = re.findall(r"^\| ([\d, ]+) \|", (ROOT / "docs" / "promises.md").read_text(), flags=re.MULTILINE)
    assert sorted(int(n) for row in rows for n in row.split(",")) == list(range(1, 36))
