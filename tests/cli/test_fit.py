"""`dsd-fast fit`: what the library does, into a folder; stopped however it may be, the same command goes on."""

import json
import os
import re
import signal
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from typer.main import get_command

import dsd_fast as dsd
from dsd_fast.cli.app import app
from dsd_fast.cli.fit.options import FitOptions
from dsd_fast.cli.fit.run import hold_out
from dsd_fast.compat.attn_procs import load_attn_procs
from dsd_fast.jobs import locked
from dsd_fast.matching.fitting.config import FitConfig
from dsd_fast.metrics import wilson
from dsd_fast.models.mini.scenes import scene
from dsd_fast.training import Descent
from tests.cli.conftest import start
from tests.cli.test_processes import HEAVY, RUN
from tests.repository.processes import run_python
from tests.repository.source import ROOT
from tests.tiny import save_tiny_lora, tiny_pipeline

TIMESTEPS = [300, 700]
SMALL = ["--timesteps", "300,700", "--batch-size", 2, "--out", "out"]


def write_data(count, file="data.jsonl", first=0):
    """Pictures of the mini model's own world, each with its caption and a wrong one, and as groups."""
    from PIL import Image

    Path("pictures").mkdir(exist_ok=True)
    rows, groups = [], []
    for seed in range(first, first + count):
        drawn = scene(seed, objects=2)
        path = Path("pictures") / f"{seed}.png"
        Image.fromarray(drawn.image).save(path)
        texts = [next(iter(drawn.negatives().values())), drawn.caption]
        rows.append({"image": path.name, "texts": texts, "label": 1, "id": str(seed)})
        groups.append(dsd.Group((path,), tuple(texts), 1, id=str(seed)))
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return groups


def matcher(**settings):
    return dsd.Matcher(dsd.load("mini"), dsd.MatchConfig(timesteps=TIMESTEPS, **settings))


def history(out="out"):
    return json.loads(Path(out, "history.json").read_text(encoding="utf-8"))


def files(out):
    """What a fit leaves, but for the time it took."""
    return {file.name: file.read_bytes() for file in Path(out).iterdir() if file.name != "history.json"}


def test_it_does_what_the_library_does(cli):
    groups, held_out = write_data(3), write_data(2, "held-out.jsonl", first=100)
    done = cli(
        "fit", "data.jsonl", "--images", "pictures", "--validation", "held-out.jsonl", "--method", "heads", "--method",
        "lora", "--steps", 4, "--validate-every", 2, "--seed", 5, "--noise-seed", 1, "--learning-rate", 0.01, "--rank",
        2, "--own-noise", "--schedule", "constant", "--warmup", 1, "--weight-decay", 0.5, "--clip-norm", 0.7,
        "--timestep-range", "100,900", *SMALL,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    own = matcher(seed=1)
    fit = FitConfig(
        steps=4, batch_size=2, validate_every=2, seed=5, learning_rate=0.01, rank=2, shared_noise=False,
        schedule="constant", warmup=1, weight_decay=0.5, clip_norm=0.7, timestep_range=(100, 900),
    )  # fmt: skip
    want = own.fit(groups, ("lora", "heads"), validation=held_out, config=fit, progress=False)
    got = history()
    assert got["records"] == [vars(record) for record in want.records]
    assert (got["steps"], got["best_step"], got["stopped_early"]) == (4, want.best_step, False)
    assert got["counts"] == {"groups": 3, "held_out": 2}
    settings = got["settings"]
    assert settings["fit"] == json.loads(json.dumps(asdict(fit)))
    assert (settings["model"], settings["timesteps"], settings["seed"]) == ("mini", TIMESTEPS, 1)
    assert (settings["methods"], settings["validation"]) == (["lora", "heads"], "held-out.jsonl")
    # Of the score before, not the weights that were learned.
    assert settings["layers"] == {name: value.tolist() for name, value in matcher().layers.items()}
    assert got["versions"]["torch"] == torch.__version__

    first, best = want.records[0], next(r for r in want.records if r.step == want.best_step)
    for found, record in ((got["before"], first), (got["after"], best)):
        assert found == {
            "step": record.step,
            "accuracy": record.accuracy,
            "interval": list(wilson(round(2 * record.accuracy), 2)),
            "loss": record.validation_loss,
        }
    cells = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines() if "│" in line]
    assert cells[0][1:4] == ["accuracy", f"{first.accuracy:.3f}", f"{best.accuracy:.3f}"]
    assert cells[2][1:4] == ["loss", f"{first.validation_loss:.4f}", f"{best.validation_loss:.4f}"]
    assert "4 steps on 3 groups, loss" in done.stdout
    assert "2 held-out questions" in done.stdout

    loaded = dsd.Matcher.load("out", matcher().model)
    captions = list(groups[0].texts)
    assert torch.equal(loaded.score(groups[0].images, captions), own.score(groups[0].images, captions))
    assert sorted(os.listdir("out")) == [
        ".lock", "history.json", "matcher.json", "pytorch_lora_weights.safetensors", "training.safetensors",
    ]  # fmt: skip


def test_the_official_recipe_part_and_file(cli):
    """The official settings where none is given, and a LoRA that the official code reads."""
    groups = write_data(1)
    done = cli(
        "fit", "data.jsonl", "--images", "pictures", "--official-recipe", "--official", "--official-lora", "--steps", 2,
        "--learning-rate", 0.02, *SMALL[:2], "--out", "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    want = asdict(FitConfig.official(2)) | {"learning_rate": 0.02}
    assert history()["settings"]["fit"] == json.loads(json.dumps(want))
    assert history()["before"] is None
    assert "│" not in done.stdout
    loaded = dsd.Matcher.load("out", matcher().model)
    plain = matcher(official=True)
    captions = list(groups[0].texts)
    before = plain.score(groups[0].images, captions)
    load_attn_procs(plain.model.unet, "out/official")
    want = plain.score(groups[0].images, captions)
    assert torch.equal(loaded.score(groups[0].images, captions), want)
    assert not torch.equal(before, want)


def test_under_an_adapter(cli, tmp_path):
    """What was fitted under a LoRA is evaluated under it, without a warning, and beside its own."""
    tiny_pipeline("sd15").save_pretrained(tmp_path / "model")
    lora = save_tiny_lora("sd15", tmp_path / "lora")
    groups = write_data(1)
    common = ["data.jsonl", "--images", "pictures", "--model", "./model"]
    under = [*common, "--adapter", "lora", "--adapter-file", lora.name]
    done = cli("fit", *under, "--steps", 1, "--learning-rate", 0.05, *SMALL)
    assert done.exit_code == 0, done.stderr
    assert history()["settings"]["adapter"] == "lora"

    model = dsd.load(tmp_path / "model")
    model.load_lora(lora, "adapter")
    own = dsd.Matcher(model, dsd.MatchConfig(timesteps=TIMESTEPS))
    captions = list(groups[0].texts)
    before = own.score(groups[0].images, captions)
    own.fit(groups, config=FitConfig(steps=1, batch_size=2, learning_rate=0.05), progress=False)
    want = own.score(groups[0].images, captions)
    assert not torch.equal(want, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = cli("evaluate", *under, "--matcher", "out", "--resamples", 5, "--out", "found")
    assert done.exit_code == 0, done.stderr
    found = pq.read_table("found/groups.parquet")["scores"].to_pylist()
    torch.testing.assert_close(torch.tensor(found), want, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="was fitted under the adapters"):
        cli("evaluate", *common, "--matcher", "out", "--resamples", 5, "--out", "found")


def test_stopped_it_goes_on_to_the_same_files(cli, tmp_path, monkeypatch):
    """Ctrl-C in this process, then kill -9 in one of its own."""
    write_data(2)
    command = [
        "fit", "data.jsonl", "--images", "pictures", "--method", "heads", "--steps", 20, "--validate-every", 15,
        "--save-every", 0, *SMALL[:-1],
    ]  # fmt: skip
    assert cli(*command, "whole").exit_code == 0
    step = Descent.step

    def interrupted(self):
        step(self)
        if self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Descent, "step", interrupted)
        done = cli(*command, "out")
    assert done.exit_code == 130
    assert "Error: interrupted; the same command goes on from the checkpoint in out" in done.stderr
    assert not Path("out/history.json").exists()

    before = Path("out/training.safetensors").read_bytes()
    process = start(*command, "out", cwd=tmp_path)
    deadline = time.monotonic() + 200
    while Path("out/training.safetensors").read_bytes() == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, stderr
    assert not Path("out/matcher.json").exists()

    done = cli(*command, "out")
    assert done.exit_code == 0, done.stderr
    assert files("out") == files("whole")
    assert history()["records"] == history("whole")["records"]
    # Done is done: the same command again changes nothing, and another one is refused.
    assert cli(*command, "out").exit_code == 0
    assert files("out") == files("whole")
    refused = cli(*command, "out", "--seed", 1)
    assert refused.exit_code == 2
    assert "is of another fit, which differs in seed; choose another folder" in " ".join(refused.stderr.split())
    assert files("out") == files("whole")


def test_an_interruption_before_the_first_step_says_so(cli, monkeypatch):
    write_data(1)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsd_fast.cli.options.ModelOptions.load", interrupted)
    done = cli("fit", "data.jsonl", "--images", "pictures", *SMALL)
    assert (done.exit_code, done.stderr.strip()) == (130, "Error: interrupted")


def test_two_at_once_are_one_sentence(cli):
    write_data(1)
    with locked(Path("out")):
        done = cli("fit", "data.jsonl", "--images", "pictures", *SMALL)
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: --out: out is being written by another process")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "all"], "method: got ('all',), expected one or more of lora, prompt, heads, each once"),
        (["--method", "lora", "--method", "lora"], "method: got ('lora', 'lora')"),
        (["--steps", "0"], "steps: got 0, expected an integer of at least 1"),
        (["--loss", "hinge"], "loss: got 'hinge'"),
        (["--schedule", "cosine"], "schedule: got 'cosine'"),
        (["--timestep-range", "5"], "--timestep-range: '5' is no range, expected for instance 0,500"),
        (["--timestep-range", "0,2000"], "timestep_range: got (0, 2000), expected at most (0, 1000)"),
        (["--attention", "self"], "attention: got 'self'"),
        (["--autocast", "half"], "autocast: got 'half'"),
        (["--patience", "2"], "patience: needs validation"),
        (["--validation", "data.jsonl", "--validation-split", "0.5"], "give --validation or --validation-split"),
        (["--validation-split", "1.5"], "validation_split: got 1.5, expected a share between 0 and 1"),
        (["--validation-split", "0.9"], "validation_split: 0.9 of 2 groups on 2 images leaves no group"),
        (["--official-lora", "--method", "heads"], "--official-lora: there is no LoRA without --method lora"),
        (["--official-split"], "--official-split depends on the data set: give --format too"),
        (["--official", "--method", "heads"], "method: heads learns weights that the official score does not have"),
        (["--format", "coco"], "format: got 'coco'"),
        (["--timesteps", "many"], "--timesteps: 'many' is neither a count nor"),
        (["--model", "./nothing"], "model './nothing' is a folder that does not exist"),
        (["--out", "a-file"], "--out a-file cannot be written: it is a file"),
        (["--images", "elsewhere"], "elsewhere/0.png does not exist"),
    ],
)
def test_usage_errors_are_one_sentence(cli, arguments, message):
    write_data(2)
    Path("a-file").write_text("not a folder")
    done = cli("fit", "data.jsonl", "--images", "pictures", *SMALL, *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert isinstance(done.exception, SystemExit)
    assert not list(Path.cwd().rglob("*.json"))


def test_held_out_groups_show_other_images():
    groups = [dsd.Group((Path(f"{n // 3}.png"),), ("a", f"{n}"), 0) for n in range(60)]
    groups += [dsd.Group((Path("x.png"), Path(f"{n}.png")), ("a",), 1) for n in range(20)]
    learned, held_out = hold_out(groups, 0.25, seed=0)
    assert sorted([*learned, *held_out], key=groups.index) == groups
    shown = [
        {group.images[group.label if len(group.images) > 1 else 0] for group in part} for part in (learned, held_out)
    ]
    assert not shown[0] & shown[1]
    # A quarter, but for the groups of the last image.
    assert 20 <= len(held_out) < 20 + 4
    assert hold_out(groups, 0.25, seed=0) == (learned, held_out)
    assert hold_out(groups, 0.25, seed=1) != (learned, held_out)


def test_help_names_the_defaults_that_hold():
    parameters = {p.name: p for p in get_command(app).commands["fit"].params}
    named = {
        name: match[1]
        for name in ("steps", "batch_size", "loss", "temperature", "margin", "rank", "attention", "prompt_tokens",
                     "validate_every", "lora_dropout", "schedule", "warmup", "weight_decay", "clip_norm")
        if (match := re.search(r"(\S+) if none", parameters[name].help))
    }  # fmt: skip
    assert len(named) == 14
    assert {name: str(getattr(FitConfig(), name)).removesuffix(".0") for name in named} == named


def test_given_settings_win_over_the_recipes():
    given = {"rank": 8, "fit_seed": 3, "own_noise": False}
    assert FitOptions(**given).config() == FitConfig(rank=8, seed=3, shared_noise=True)
    recipe = replace(FitConfig.official(FitConfig().steps), rank=8, seed=3, shared_noise=True)
    assert FitOptions(official_recipe=True, **given).config() == recipe
    assert FitOptions(official_recipe=True, loss="cross-entropy", steps=5).config().loss == "cross-entropy"


def test_start_is_light():
    done = run_python(["-c", RUN.format(heavy=HEAVY), "fit", "--help"], cwd=ROOT, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.returncode == 0
