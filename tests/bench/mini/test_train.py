import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks.mini import stages
from benchmarks.mini.loop import Recipe, fit
from benchmarks.mini.networks import build, export
from benchmarks.mini.train import app
from dsd_fast.jobs import read_tensors
from dsd_fast.training import CHECKPOINT

pytest.importorskip("sklearn")


def _same(first, second):
    (a, about_a), (b, about_b) = read_tensors(first), read_tensors(second)
    assert about_a == about_b
    assert a.keys() == b.keys()
    for key in a:
        assert torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6), key


@pytest.mark.alone
def test_killed_process_goes_on_as_if_it_had_not_been(tmp_path):
    steps = 24
    command = [sys.executable, "-m", "benchmarks.mini.train", "model", "--out", str(tmp_path / "killed")]
    options = ["--stage", "vae", "--vae-steps", str(steps), "--batch", "4", "--threads", "1", "--save-every", "0"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = tmp_path / "killed" / "vae" / CHECKPOINT
    deadline = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = read_tensors(file)[1]["step"]
    assert 0 < step < steps

    recipe = Recipe(steps, 2, 2e-3)
    assert stages.train_vae(build(), recipe, tmp_path / "killed", measured=64)
    assert stages.train_vae(build(), recipe, tmp_path / "whole", measured=64)
    _same(file, tmp_path / "whole" / "vae" / CHECKPOINT)
    final, whole = (read_tensors(tmp_path / name / "vae-final.safetensors")[0] for name in ("killed", "whole"))
    assert all(torch.allclose(final[key], whole[key], rtol=1e-3, atol=1e-5) for key in whole)


def test_unet_and_text_tower_resume_after_a_crash_and_export(tmp_path, monkeypatch):
    def run(folder):
        parts = build()
        return parts, stages.train_unet(parts, Recipe(6, 4, 1e-3), folder, pictures=8, bfloat16=False, save_every=0)

    assert run(tmp_path / "whole")[1]
    calls, real = [], stages.contrastive

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "contrastive", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "crashed")
    assert read_tensors(tmp_path / "crashed" / "unet" / CHECKPOINT)[1]["step"] == 4
    parts, done = run(tmp_path / "crashed")
    assert done
    _same(tmp_path / "crashed" / "unet" / CHECKPOINT, tmp_path / "whole" / "unet" / CHECKPOINT)

    assert stages.load(parts, tmp_path / "crashed") == ["unet"]
    folder = tmp_path / "weights"
    for _ in range(2):
        assert export(parts, folder) < 16_000_000
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    assert (folder / "model_index.json").is_file()


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_command_stops_when_told_and_exports_what_there_is(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["model", "--out", str(tmp_path), "--batch", "2", "--threads", "1", *arguments])

    assert run("--stage", "clip", "--clip-steps", "2", "--minutes", "0").exit_code == 3
    assert run("--stage", "clip", "--clip-steps", "2").exit_code == 0
    assert stages.load(build(), tmp_path) == ["clip"]
    result = run("--stage", "export")
    assert result.exit_code == 0, result.output
    assert "untrained: unet, vae" in " ".join(result.output.split())
    assert (tmp_path / "weights" / "model_index.json").is_file()


def test_standardised_latents_leave_reconstructions_unchanged():
    parts = build()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = parts.vae(pixels).sample
        stages.standardise(parts, pictures=64)
        after = parts.vae(pixels).sample
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-4)


def _linear(tmp_path, recipe, **options):
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)

    def loss(step):
        torch.manual_seed(step)
        return layer(torch.randn(8, 3)).square().mean()

    return fit("line", dict(layer.named_parameters()), loss, recipe, tmp_path, **options)


def test_stopping_by_time_and_refusing_another_recipe(tmp_path):
    recipe = Recipe(5, 8, 1e-2)
    assert not _linear(tmp_path, recipe, minutes=0)
    assert read_tensors(tmp_path / "line" / CHECKPOINT)[1]["step"] == 1
    assert _linear(tmp_path, recipe)
    assert _linear(tmp_path, recipe)
    with pytest.raises(ValueError, match="choose another"):
        _linear(tmp_path, Recipe(5, 8, 2e-2))


def test_learning_rate_is_independent_of_the_length_until_it_falls():
    short, long = Recipe(1000, 1, 1e-3), Recipe(2000, 1, 1e-3)
    assert all(short.rate_at(step) == long.rate_at(step) for step in range(500))
    assert short.rate_at(999) < 1e-5


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a red circle", {"red": [0, 4, -1]}),
        ("a small cyan ring", {"cyan": [4, 4, 0]}),
        ("a large red circle left of a blue square", {"red": [0, 0, 1], "blue": [1, 1, -1]}),
        ("a purple cross below a small green square", {"purple": [3, 3, -1], "green": [1, 2, 0]}),
        ("a photo of the digit seven", {"digit": 7}),
    ],
)
def test_facts_are_what_the_caption_says(caption, said):
    # Shapes, sides and sizes in the order of the task; 5, 4 and -1 stand for none.
    rows = [said.get(colour, [5, 4, -1]) for colour in ("red", "green", "blue", "yellow", "purple", "cyan")]
    assert stages.facts(caption) == [answer for row in rows for answer in row] + [said.get("digit", 10)]


def test_facts_of_every_training_caption_are_answers():
    for seed in range(500):
        drawn = stages.example(seed, 0.2)
        for caption in (drawn.caption, drawn.negative):
            assert len(found := stages.facts(caption)) == len(stages.FACTS)
            assert all(-1 <= answer < count for answer, count in zip(found, stages.FACTS, strict=True))
        assert stages.facts(drawn.caption) != stages.facts(drawn.negative)


def test_clip_stage_survives_a_batch_in_which_no_caption_names_a_size(tmp_path):
    # Two pictures seldom name the size of all six colours: a mean over no answers would be no number.
    parts = build()
    assert stages.train_clip(parts, Recipe(3, 2, 1e-3), tmp_path)
    saved = read_tensors(tmp_path / "clip" / CHECKPOINT, "model.")[0]
    assert all(bool(torch.isfinite(value).all()) for value in saved.values())
    assert {name.split(".")[0] for name in saved} == {"clip", "head"}
    assert stages.load(parts, tmp_path) == ["clip"]
