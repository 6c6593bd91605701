"""What docs/class-tokens.md shows runs, and is read, as it stands."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

from dsd_fast.class_tokens import TokenConfig
from dsd_fast.cli.app import app
from dsd_fast.jobs import read_index
from tests.repository.processes import run_python
from tests.repository.source import ROOT

TEXT = (ROOT / "docs" / "class-tokens.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def table(header):
    lines = TEXT.split(header)[1].split("\n\n")[0].splitlines()[2:]
    return [line.split("|")[1:-1] for line in lines]


def test_its_code_and_its_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in blocks("sh")[0].replace("\\\n", "").splitlines():
        command = shlex.split(line)
        assert command[0] == "dsd-fast"
        with pytest.raises(SystemExit) as done:
            get_command(app)(command[1:])
        assert done.value.code in (0, None)
    (code,) = blocks("python")
    Path("example.py").write_text(code)
    printed = run_python(["example.py"], cwd=tmp_path, path=[ROOT]).stdout.splitlines()
    assert [line.split()[:2] for line in printed] == [["<square>", "square"], ["<cross>", "cross"]]
    assert {line.split()[3] for line in printed} <= {"accuracy", "updates"}
    assert read_index("rings").num_rows == 1
    listed = {name for row in table("| file | what |") for name in re.findall(r"`([^`]+)`", row[0])}
    listed = {name.replace("<name>", "*") for name in listed}
    found = [path.relative_to("shapes") for path in Path("shapes").rglob("*") if path.is_file()]
    found = [path for path in found if not path.name.startswith(".") and path.parts[0] != "images"]
    assert all(any(path.match(name) for name in listed) for path in found)
    assert all(any(path.match(name) for path in found) for name in listed - {"images/"})
    assert Path("marks/cross-token.safetensors").is_file()


def test_its_tables_and_options_name_what_there_is():
    rows = table("| setting | what | default |")
    assert {name for row in rows for name in re.findall(r"`([a-z_]+)`", row[0])} == {
        field.name for field in fields(TokenConfig)
    }
    commands = get_command(app).commands
    parameters = [*commands["tokens"].commands.values(), commands["generate"]]
    options = {name for command in parameters for parameter in command.params for name in parameter.opts}
    words = re.sub(r"<!-- bench:.*?<!-- /bench:\S+ -->", "", TEXT, flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", words)) <= options
