"""What docs/generation.md shows runs, and is read, as it stands."""

import os
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

import dsd_fast as dsd
from dsd_fast.cli.app import app
from dsd_fast.diffusion import SAMPLERS
from dsd_fast.generation import GenerateConfig, GenerateRow
from dsd_fast.jobs import read_index
from tests.repository.processes import run_python
from tests.repository.source import ROOT

TEXT = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def table(header):
    lines = TEXT.split(header)[1].split("\n\n")[0].splitlines()[2:]
    return [name for line in lines for name in re.findall(r"`([^`]+)`", line.split("|")[1])]


def test_its_code_and_its_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, again = blocks("python")
    commands = [shlex.split(line) for line in blocks("sh")[0].replace("\\\n", "").splitlines()]
    assert [command[:2] for command in commands] == [["dsd-fast", "generate"]] * 2
    for command in commands:
        with pytest.raises(SystemExit) as done:
            get_command(app)(command[1:])
        assert done.value.code in (0, None)
    script = tmp_path / "dsd-fast"
    script.write_text(f"#!{sys.executable}\nfrom dsd_fast.cli import main\nmain()\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "examples.py").write_text("\n".join((first, second, again)))
    printed = run_python(["examples.py"], cwd=tmp_path, path=[ROOT]).stdout
    assert "\n2 2\n" in f"\n{printed}"
    assert "a blue square 1" in printed
    assert "it is the same: levels differ by at most" in printed
    assert (tmp_path / "0.png").is_file()
    assert read_index("few").num_rows == read_index("classes").num_rows == 8
    # The files of the table are those that are there.
    listed = {re.sub(r"^\d{5}", "*", name) for name in table("| file | what |")}
    found = [path.relative_to("classes") for path in Path("classes").rglob("*") if path.is_file()]
    found = [path for path in found if not path.name.startswith(".")]
    assert all(any(path.match(name) for name in listed) for path in found)
    assert all(any(path.match(name) for path in found) for name in listed if "<" not in name)


def test_its_tables_and_options_name_what_there_is():
    assert set(table("| setting | what | default |")) == {field.name for field in fields(GenerateConfig)}
    rows = {name for name in table("| field | what |") if name not in ("height", "width")}
    assert rows == {field.name for field in fields(GenerateRow)}
    assert all(f"`{name}`" in TEXT for name in SAMPLERS)
    assert all(hasattr(dsd.generation, name) for name in re.findall(r"\| `(Accept\w+)\(", TEXT))
    options = [name for parameter in get_command(app).commands["generate"].params for name in parameter.opts]
    # Beside the records' tables, which name the commands that made them.
    words = re.sub(r"<!-- bench:.*?<!-- /bench:\S+ -->", "", TEXT, flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", words)) <= set(options)
