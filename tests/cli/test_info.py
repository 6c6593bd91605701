"""`dsd-fast info`: its numbers are the program's own."""

import json
from inspect import signature

import pytest
import torch
from safetensors.torch import save_file

import dsd_fast as dsd
from dsd_fast.cli.app import app
from dsd_fast.matching import official_layers
from dsd_fast.matching.score import PairScorer
from dsd_fast.unet import UNetProgram
from tests.models.original import checkpoint
from tests.tiny import tiny_pipeline

SIZE = {"height": 16, "width": 16, "tokens": 24}


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(scope="module")
def program(model):
    return UNetProgram(model.unet)


def test_json_is_the_program(cli, model, program):
    done = cli("info", "mini", "--json")
    assert done.exit_code == 0, done.stderr
    content = json.loads(done.stdout)
    assert list(content["layers"]) == list(program.layer_ids)
    out = program.plan(features=program.layer_ids).empty_output(1, 16, 16, tokens=24)
    assert content["layers"] == {name: list(value.shape[1:]) for name, value in out.features.items()}
    assert list(content["scores"]) == list(program.score_ids)
    assert [name for name, score in content["scores"].items() if score["official"]] == official_layers(program)
    assert {name: score["heads"] for name, score in content["scores"].items()} == {
        name: program.attention(name).heads for name in program.score_ids
    }
    assert sum(block["layer_ids"] for block in content["blocks"].values()) == len(program.layer_ids)
    assert sum(block["score_ids"] for block in content["blocks"].values()) == len(program.score_ids)
    assert content["components"]["unet"] == {
        "class": "UNet2DConditionModel",
        "parameters": sum(parameter.numel() for parameter in model.unet.parameters()),
        "dtype": "float32",
    }
    assert set(content["components"]) == {"unet", "vae", "text_encoder", "clip"}
    assert content["image_size"] == [64, 64]
    assert content["latent_shape"] == [4, 16, 16]
    assert content["schedule"]["prediction_type"] == "epsilon"
    assert "job" not in content


def test_costs_are_the_plans(cli, program):
    cost = json.loads(cli("info", "--json").stdout)["cost"]
    whole = program.plan(noise_pred=True)
    assert cost["row"] == whole.flops(latents=1, texts=0, rows=1, **SIZE)
    assert cost["text"] == whole.flops(latents=0, texts=1, rows=0, **SIZE)
    # A second text for the same noised latent costs a row without what the two share.
    assert cost["row"] - cost["text_free"] == whole.flops(latents=1, texts=0, rows=2, **SIZE) - cost["row"]
    stops = {stop["after"]: stop for stop in cost["stops"]}
    assert list(stops) == ["mid", "up-level0", "up-level1", "up-level2", "noise prediction"]
    for name, layer in (("mid", "mid-repeat1-res-out"), ("up-level0", "up-level0-upsampler-out")):
        early = program.plan(features=[layer]).flops(latents=1, texts=0, rows=1, **SIZE)
        assert stops[name] == {"after": name, "layer": layer, "row": early, "share": early / cost["row"]}
    assert stops["noise prediction"]["row"] == cost["row"]


def test_a_job_costs_what_the_matcher_runs(cli, model):
    job = json.loads(cli("info", "--json", "--images", 3, "--captions", 5, "--timesteps", "50").stdout)["job"]
    # The official grid has 49 timesteps where 50 are asked for.
    assert len(job["timesteps"]) == 49
    both, attention, official = job["ways"]
    scorer = PairScorer.of(model, dsd.MatchConfig(timesteps=50))
    assert both["rows"] == 3 * 49 * 6
    assert both["flops"] == scorer.plan.flops(latents=3 * 49, texts=6, rows=3 * 49 * 6, **SIZE)
    alone = PairScorer.of(model, dsd.MatchConfig(timesteps=50, noise_weight=0))
    assert attention["rows"] == 3 * 49 * 5
    assert attention["flops"] == alone.plan.flops(latents=3 * 49, texts=5, rows=3 * 49 * 5, **SIZE)
    rows = 2 * 3 * 49 * 5
    assert official["rows"] == rows
    plan = scorer.program.plan(noise_pred=True)
    assert official["flops"] == plan.flops(latents=rows, texts=rows, rows=rows, **SIZE)


def test_tables_have_the_numbers(cli, program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short = cli("info", "--images", 16, "--captions", 16)
    assert short.exit_code == 0
    assert f"{len(program.layer_ids)} layer ids, {len(program.score_ids)} score ids" in short.stdout
    assert "5,300,628" in short.stdout
    assert "up-level0-repeat0-vit-block0-cross-q" not in short.stdout
    assert "16 images with 16 captions at 10 timesteps" in short.stdout
    assert max(len(line) for line in short.stdout.splitlines()) <= 80
    long = cli("info", "--layers").stdout.split("\n")
    listed = {line.split()[0]: " ".join(line.split()[1:]) for line in long if line.strip()}
    assert set(program.layer_ids) | set(program.score_ids) <= set(listed)
    assert listed["up-level0-upsampler-out"] == "128 x 8 x 8"
    assert listed["mid-vit-block0-cross"] == "score, 4 heads, official"


def test_a_model_of_one_file(cli, model, tmp_path):
    save_file(checkpoint(model.to_pipeline()), tmp_path / "one.safetensors")
    done = cli("info", "one.safetensors", "--model-config", "mini", "--json")
    assert done.exit_code == 0, done.stderr
    content, want = (json.loads(each.stdout) for each in (done, cli("info", "mini", "--json")))
    del want["components"]["clip"]
    assert content == want | {"model": "one.safetensors"}
    refused = cli("info", "mini", "--model-config", "mini")
    assert (refused.exit_code, "config is 'mini', but model 'mini' has its own" in refused.stderr) == (2, True)


def test_sdxl_has_two_text_encoders_and_shares_little(cli, tmp_path):
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "model")
    content = json.loads(cli("info", "./model", "--json").stdout)
    assert content["family"] == "sdxl"
    assert {"text_encoder", "text_encoder_2"} <= set(content["components"])
    program = UNetProgram(dsd.load(tmp_path / "model").unet)
    assert list(content["layers"]) == list(program.layer_ids)
    assert content["cost"]["row"] == program.plan(noise_pred=True).flops(
        latents=1, texts=0, rows=1, height=16, width=16, tokens=77
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nothing"], "model './nothing' is a folder that does not exist"),
        (["--images", "3"], "give --images and --captions together"),
        (["--images", "3", "--captions", "2", "--timesteps", "5,1000"], "timesteps holds 1000"),
        (["--dtype", "int8"], "dtype is 'int8'"),
    ],
)
def test_usage_errors_are_one_sentence(cli, arguments, message):
    done = cli("info", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_a_type_that_the_processor_lacks_is_told_in_a_sentence(cli, monkeypatch, dtype, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    done = cli("info", "--json", "--dtype", dtype)
    assert json.loads(done.stdout)["components"]["unet"]["dtype"] == dtype
    sentence = f"this processor has no {dtype} units: float32 is faster on it, and more exact (--dtype float32)"
    assert done.stderr.splitlines() == ["loading mini", *([sentence] if said else [])]


def test_every_command_that_loads_a_model_takes_its_type():
    for command in app.registered_commands:
        names = signature(command.callback).parameters
        # A zero-shot run's file says it.
        assert ("dtype" in names) == (command.callback.__name__ not in ("bench", "bench_docs", "zsl"))
