"""Options that cannot work are refused before a model is loaded, and leave nothing behind."""

import json
from pathlib import Path

import pytest

MATCH = ["match", "a.png", "--caption", "a"]
FEATURES = ["features", "a.png"]
GATE = ["gate", "a.png"]
GENERATE = ["generate", "a"]
EVALUATE, FIT = ["evaluate", "groups.jsonl"], ["fit", "groups.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MATCH, "--runtime", "fast"], "runtime: got 'fast', expected 'inductor' or 'cudagraph'"),
        ([*MATCH, "--adapter", "none.safetensors"], "LoRA 'none.safetensors' does not exist"),
        ([*MATCH, "--adapter-file", "a.safetensors"], "--adapter-file: given without --adapter"),
        ([*MATCH, "--timesteps", ","], "--timesteps: got ','"),
        ([*MATCH, "--timesteps", "5,-3"], "--timesteps: got '5,-3', expected at least one, and none below 0"),
        ([*MATCH, "--dtype", "int8"], "dtype is 'int8'"),
        ([*FEATURES, "--runtime", "cudagraph"], "runtime: 'cudagraph' needs a network on a CUDA device"),
        ([*FEATURES, "--layout", "zip"], "layout: got 'zip', expected one of shards"),
        ([*FEATURES, "--control-scale", "2"], "--control-scale: got 1 for 0 --control"),
        ([*FEATURES, "--control", "./none"], "ControlNet './none' is a folder that does not exist"),
        ([*FEATURES, "--inversion", "--draws", "2"], "draws: got 2, expected 1: an inversion draws no noise"),
        ([*FEATURES, "--denoise-steps", "2"], "denoise_steps: given without denoise_from"),
        ([*FEATURES, "--timesteps", "-5"], "--timesteps: got '-5'"),
        ([*FEATURES, "--out", "a-file/below"], "--out a-file/below cannot be written"),
        (GATE, "give a technique: --prompt, --prompts,"),
        ([*GATE, "--denoise-steps", "2"], "--denoise-steps: given without --denoise-from"),
        ([*GATE, "--adapter", "own=none.safetensors"], "LoRA 'none.safetensors' does not exist"),
        ([*GATE, "--prompt", "a", "--strength", "0"], "strength is 0.0, expected above 0"),
        ([*GATE, "--prompt", "a", "--timesteps", "0"], "timesteps: got 0 alone, where nothing shifts"),
        ([*GATE, "--prompt", "a", "--out", "a-file"], "--out a-file cannot be written: it is a file"),
        ([*GENERATE, "--layout", "zip"], "layout: got 'zip', expected one of webdataset"),
        ([*GENERATE, "--format", "png", "--quality", "90"], "quality: got 90 for png"),
        ([*GENERATE, "--seeds", "5:5"], "--seeds: '5:5' is an empty range"),
        ([*GENERATE, "--seeds", "-1"], "--seeds: '-1' is no seed"),
        ([*GENERATE, "--seeds", str(1 << 64)], "expected an integer from 0 to 2**64 - 1"),
        ([*GENERATE, "--guidance-interval", "5"], "--guidance-interval: '5' is no interval"),
        ([*GENERATE, "--scheduler", "best"], "scheduler: got 'best', expected one of ddim"),
        ([*GENERATE, "--steps", "0"], "steps: got 0, expected an integer of at least 1"),
        (
            [*GENERATE, "--prompts", "groups.jsonl"],
            "got PROMPT and --prompts, expected PROMPT,",
        ),
        ([*GENERATE, "--template", "a {}"], "got PROMPT and --template"),
        ([*GENERATE, "--class", "ring"], "--class: given without --template"),
        ([*GENERATE, "--accept", "clip"], "--accept clip needs --threshold"),
        ([*GENERATE, "--max-tries", "3"], "--max-tries: given without --accept"),
        ([*GENERATE, "--per-class", "3"], "--per-class: given without classes"),
        ([*GENERATE, "--condition", "a.png"], "--condition: got 1 for 0 --control"),
        ([*GENERATE, "--control", "mini"], "--control: given without --condition"),
        ([*GENERATE, "--control", "mini", "--condition", "none.png"], "--condition: none.png does not exist"),
        ([*GENERATE, "--image", "none.png"], "--image: none.png does not exist"),
        ([*GENERATE, "--accept", "zero-shot"], "--accept: given without classes"),
        ([*GENERATE, "--near-duplicates", "2"], "--near-duplicates': Input should be less than or equal to"),
        ([*GENERATE, "--accept", "clip", "--threshold", "2"], "--threshold': Input should be less than or equal to"),
        ([*GENERATE, "--tokens", "none"], "--tokens: none does not exist"),
        ([*GENERATE, "--worker", "2", "--workers", "2"], "--worker: got 2, expected below --workers, 2"),
        (["generate", "--prompts", "groups.jsonl"], "groups.jsonl, line 1, column 'texts'"),
        (["generate", "--template", "a ring", "--class", "x"], "templates: got 'a ring'"),
        ([*EVALUATE, "--matcher", "none"], "folder: none has no matcher.json"),
        ([*EVALUATE, "--runtime", "fast"], "runtime: got 'fast'"),
        ([*FIT, "--patience", "2"], "patience: needs validation"),
        ([*FIT, "--adapter", "none.safetensors"], "LoRA 'none.safetensors' does not exist"),
    ],
)
def test_the_options_own_error_comes_first(cli, arguments, message):
    Path("a-file").touch()
    Path("a.png").touch()
    Path("groups.jsonl").write_text(json.dumps({"image": "a.png", "texts": ["a", "b"], "label": 0}))
    done = cli(arguments[0], "--out", "out", "--model", "no/such/model", *arguments[1:])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "loading" not in done.stderr
    assert not Path("out").exists()
