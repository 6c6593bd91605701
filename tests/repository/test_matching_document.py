"""What docs/matching.md shows runs, and is read, as it stands."""

import json
import re
import shlex

import pytest
from typer.main import get_command

import dsd_fast as dsd
from dsd_fast.cli.app import app
from dsd_fast.compat import DSDPipeline
from tests.repository.processes import run_python
from tests.repository.source import ROOT

TEXT = (ROOT / "docs" / "matching.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def run(code, folder):
    (folder / "example.py").write_text(code, encoding="utf-8")
    run_python(["example.py"], cwd=folder, path=[ROOT])


def test_its_commands_run_on_the_data_that_it_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, last = blocks("python")
    run(first, tmp_path)
    (shell,) = blocks("sh")
    commands = [shlex.split(line) for line in shell.replace("\\\n", "").splitlines()]
    assert [command[:2] for command in commands] == [["dsd-fast", name] for name in ("evaluate", "fit", "evaluate")]
    for command in commands:
        with pytest.raises(SystemExit) as done:
            get_command(app)(command[1:])
        assert done.value.code in (0, None)
    run(last, tmp_path)
    # What was fitted scores otherwise than what was not, by the commands and from the folder.
    before, after = (json.loads((tmp_path / name / "results.json").read_bytes()) for name in ("before", "after"))
    assert before["counts"]["scored"] == after["counts"]["scored"] == 12
    question = dsd.read_groups(tmp_path / "questions.jsonl")[0]
    plain = dsd.Matcher(dsd.load("mini"), dsd.MatchConfig(timesteps=[500]))
    fitted = dsd.Matcher.load("fitted", dsd.load("mini")).score(question.images, question.texts)
    assert (fitted - plain.score(question.images, question.texts)).abs().max() > 1e-3
    # The files of the table are those that are there, but for the learned vectors.
    listed = re.findall(r"^\| `([\w./]+\.(?:json|safetensors))` \|", TEXT, re.MULTILINE)
    assert {name for name in listed if not (tmp_path / "fitted" / name).is_file()} == {"prompt.safetensors"}
    pipe = DSDPipeline.from_pretrained("mini")
    pipe.unet.load_attn_procs("fitted/official")


@pytest.mark.parametrize(
    ("format", "file", "shape"),
    [
        ("jsonl", "groups.jsonl", [(1, 2), (2, 1)]),
        ("csv", "groups.csv", [(1, 2)]),
        ("comvg", "groups.csv", [(2, 1)]),
        ("vqa", "groups.csv", [(1, 10)]),
        ("winoground", "groups.jsonl", [(2, 2), (2, 2)]),
    ],
)
def test_its_examples_of_formats_are_read(tmp_path, format, file, shape):
    starts = {"jsonl": '{"image":', "csv": "image,", "comvg": "id,", "vqa": "sentence,", "winoground": '{"id":'}
    (block,) = [each for each in blocks("") if each.startswith(starts[format])]
    (tmp_path / file).write_text(block, encoding="utf-8")
    read = dsd.read_groups(tmp_path / file, format)
    assert [(len(group.images), len(group.texts)) for group in read] == shape
    # The columns tell the format, too.
    assert read == dsd.read_groups(tmp_path / file)


def test_its_examples_of_drawn_negatives_are_read_where_there_are_enough(tmp_path):
    (lines,) = [each for each in blocks("") if "*The question is asking about yes or no" in each]
    (refs,) = [each for each in blocks("") if each.startswith("[{")]
    others = [f"{number}.jpg*The question is asking about yes or no: Is it? It is {number}." for number in range(9)]
    (tmp_path / "test.txt").write_text(lines + "\n".join(others))
    groups = dsd.read_groups(tmp_path / "test.txt")
    assert groups[0].texts == ("Is the bus red? The bus is red.",)
    assert [len(group.images) for group in groups] == [10] * 11
    more = [{"ref_id": n, "image_id": n, "split": "val", "sentences": [{"raw": str(n)}]} for n in range(20, 29)]
    (tmp_path / "refs.json").write_text(json.dumps(json.loads(refs) + more))
    groups = dsd.read_groups(tmp_path / "refs.json", image_name="{}.jpg")
    assert (groups[0].category, groups[0].texts[0], len(groups[0].texts)) == ("val", "the man in blue", 10)
