"""What docs/image-prompts.md shows runs, and is read, as it stands."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

from dsd_fast.cli.app import app
from dsd_fast.image_prompt import ImagePromptConfig, TuneConfig
from dsd_fast.jobs import read_index
from tests.repository.processes import run_python
from tests.repository.source import ROOT

TEXT = (ROOT / "docs" / "image-prompts.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def tables(header):
    """Cells of each table of that header, row by row."""
    parts = TEXT.split(f"{header}\n")[1:]
    return [[line.split("|")[1:-1] for line in part.split("\n\n")[0].splitlines()[1:]] for part in parts]


def named(cell):
    return re.findall(r"`([\w*./-]+)`", cell)


def test_its_code_and_its_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in blocks("sh")[0].replace("\\\n", "").splitlines():
        command = shlex.split(line)
        assert command[0] == "dsd-fast"
        with pytest.raises(SystemExit) as done:
            get_command(app)(command[1:])
        assert done.value.code in (0, None), line
    (code,) = blocks("python")
    Path("example.py").write_text(code)
    printed = run_python(["example.py"], cwd=tmp_path, path=[ROOT]).stdout.splitlines()
    assert printed == ["2 (2, 24, 128)", "(64, 64)", "(64, 64)", "(2, 2)"]
    for folder in ("variations", "edited", "tuned-variations"):
        assert read_index(folder)["status"].to_pylist() == ["ok"] * 2
    for folder, rows in zip(("prompts", "tuned"), tables("| file | what |"), strict=True):
        listed = {name for row in rows for name in named(row[0])}
        found = [path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()]
        found = [path for path in found if not path.name.startswith(".")]
        assert all(any(path.match(name) for name in listed) for path in found)
        assert all(any(path.match(name) for path in found) for name in listed)


def test_its_tables_and_options_name_what_there_is():
    (rows,) = tables("| setting | what | default |")
    assert {name for row in rows for name in named(row[0])} == {field.name for field in fields(ImagePromptConfig)}
    (rows,) = tables("| setting | what | finetune | customize |")
    names = [name for row in rows for name in named(row[0])]
    assert set(names) == {field.name for field in fields(TuneConfig)}
    for column, config in ((2, TuneConfig()), (3, TuneConfig.few())):
        told = [value.strip().strip("`") for row in rows for value in row[column].split(", ")]
        words = {"none": None, "all": None, "no": False}
        for name, value in zip(names, told, strict=True):
            want = getattr(config, name)
            assert words[value] is want if value in words else type(want)(value) == want, name
    commands = get_command(app).commands
    parameters = [*commands["prompt"].commands.values(), commands["generate"]]
    options = {name for command in parameters for parameter in command.params for name in parameter.opts}
    words = re.sub(r"<!-- bench:.*?<!-- /bench:\S+ -->", "", TEXT, flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", words)) <= options
