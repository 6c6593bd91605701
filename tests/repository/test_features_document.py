"""What docs/features.md shows runs, and is read, as it stands."""

import inspect
import re
import shlex
from dataclasses import fields

import pytest
from typer.main import get_command

import dsd_fast as dsd
from dsd_fast.cli.app import app
from dsd_fast.features import SETS
from dsd_fast.features.layers import layer_set
from dsd_fast.jobs import read_index
from dsd_fast.unet import UNetProgram
from tests.repository.processes import run_python
from tests.repository.source import ROOT

TEXT = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_its_code_and_its_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = blocks("python")
    assert len(examples) == 7
    reads = next(number for number, code in enumerate(examples) if "read_index" in code)
    data = next(number for number, code in enumerate(examples) if "prompts.jsonl" in code)
    # One process for all: each block imports what it needs, and none may need what an earlier one left.
    assert all("import" in code for code in examples)
    before = "\n".join(f"def block{n}():\n" + indented(code) for n, code in enumerate(examples) if n != reads)
    (tmp_path / "examples.py").write_text(before + "".join(f"\nblock{n}()" for n in range(len(examples)) if n != reads))
    printed = run_python(["examples.py"], cwd=tmp_path, path=[ROOT]).stdout
    shapes = [(96, 8, 8), (96, 16, 16)]
    assert all(f"(2, 2, {c}, {h}, {w})" in printed for c, h, w in shapes)
    assert len(re.findall(r"^(plain|inverted) \S+ (50|200) -?[\d.]+$", printed, re.MULTILINE)) == 2 * 4 * 2
    assert (tmp_path / "mixer.safetensors").is_file()
    assert data < reads
    (shell,) = blocks("sh")
    commands = [shlex.split(line) for line in shell.replace("\\\n", "").splitlines()]
    assert [command[:2] for command in commands] == [["dsd-fast", name] for name in ("features", "features", "gate")]
    for command in commands:
        with pytest.raises(SystemExit) as done:
            get_command(app)(command[1:])
        assert done.value.code in (0, None)
    (tmp_path / "reads.py").write_text(f"{examples[reads]}\nprint(tuple(feature.shape), feature.dtype)")
    assert run_python(["reads.py"], cwd=tmp_path, path=[ROOT]).stdout == "(2, 8, 8, 8) torch.float16\n"
    assert read_index("features").num_rows == read_index("official").num_rows == 6
    # The files of the table are those that are there.
    (table,) = re.findall(r"\| file \| what \|\n\|[-|]+\|\n(.*?)\n\n", TEXT, re.DOTALL)
    listed = [name for line in table.splitlines() for name in re.findall(r"`([\w*./]+)`", line.split("|")[1])]
    found = [path for path in (tmp_path / "features").rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert all(any(path.relative_to(tmp_path / "features").match(name) for path in found) for name in listed)
    assert all(any(path.relative_to(tmp_path / "features").match(name) for name in listed) for path in found)
    assert (tmp_path / "official" / "up-level0-upsampler-out" / "0.npy").is_file()


def indented(code):
    return "".join(f"    {line}\n" if line else "\n" for line in code.splitlines())


def test_its_tables_name_what_there_is():
    section = TEXT.split("### Layers")[1].split("### Timesteps")[0]
    named = {
        name for line in section.splitlines() if line.startswith("| `") for name in re.findall(r"`([\w-]+)`", line)
    }
    assert named == {*SETS, "practical", "legacy", "all"}
    program = UNetProgram(dsd.load("mini").unet)
    assert layer_set("practical", program) == SETS["practical-mini"]
    settings = TEXT.split("| setting | what | default |")[1].split("\n\n")[0]
    named = {name for line in settings.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    parameters = set(inspect.signature(dsd.FeatureExtractor).parameters)
    # What is no property of the features is said elsewhere.
    assert named == parameters - {"model", "memory_budget"}
    parts = TEXT.split("| part of `Technique` | what | command |")[1].split("\n\n")[0]
    named = {name for line in parts.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named == {field.name for field in fields(dsd.Technique)} - {"name", "denoise_steps"}
    options = {option for command in ("features", "gate") for option in options_of(command)}
    for option in re.findall(r"`(--[\w-]+)", TEXT):
        assert option in options, option


def options_of(command):
    return [name for parameter in get_command(app).commands[command].params for name in parameter.opts]
