"""`dsd-fast tokens`: what the library does, into a folder; what is shown of it, and what other programs are given."""

import io
import json
import re
from dataclasses import asdict, fields
from inspect import Parameter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import dsd_fast as dsd
from dsd_fast.class_tokens import ClassTokenLearner, TokenConfig, TokenUpdate
from dsd_fast.cli.options import AdaptedModelOptions, ModelOptions
from dsd_fast.cli.terminal import CommandError, counted, progress
from dsd_fast.cli.tokens.learn import _Bars
from dsd_fast.cli.tokens.options import LearnRequest
from dsd_fast.cli.tokens.show import nearest_words
from dsd_fast.engine import LearnedTokens
from dsd_fast.generation import GenerateConfig
from dsd_fast.jobs import locked
from dsd_fast.models.mini.scenes import scene
from tests.cli.test_report import Seen
from tests.tiny import tiny_pipeline, trained_like

HOSTILE = "<b>[/ring]'&\""
SMALL = [
    "--template", "a {}", "--steps", 1, "--gradient-steps", 1, "--images", 1, "--updates", 2, "--stopping", "never",
    "--out", "out",
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return dsd.load("mini")


@pytest.fixture(autouse=True)
def loaded(model, monkeypatch):
    """The mini model as it is, loaded once for all commands."""
    for options in (ModelOptions, AdaptedModelOptions):
        monkeypatch.setattr(options, "load", lambda self: model)


def word(model, name):
    """A word's vector in the vocabulary, (E,)."""
    number = model.tokenizers[0].get_vocab()[f"{name}</w>"]
    return model.text_encoders[0].get_input_embeddings().weight[number].detach().clone()


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[token], other[token]) for token in one)


def test_its_options_are_the_settings_with_their_defaults():
    parameters = list(LearnRequest.parameters())
    defaults = {p.name: None if p.default is Parameter.empty else p.default for p in parameters}
    assert LearnRequest.of(defaults).config() == TokenConfig()
    assert {field.name for field in fields(TokenConfig)} <= {p.name for p in parameters}


@pytest.mark.newest
def test_it_learns_what_the_library_does_and_shows_it(cli, model):
    done = cli(
        "tokens", "learn", "ring", HOSTILE, "--classifier", "clip", *SMALL, "--steps", 2, "--images", 2,
        "--pictures", 2, "--report", "--guidance", 2, "--scheduler", "ddim", "--keep", "last",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    config = TokenConfig(
        templates=("a {}",), steps=2, gradient_steps=1, images=2, updates=2, guidance=2.0, scheduler="ddim",
        keep="last", stopping="never",
    )  # fmt: skip
    learner = ClassTokenLearner(model, "clip", config)
    want = learner.learn(["ring", HOSTILE])
    got = LearnedTokens.load("out")
    assert same(got, want)
    assert not torch.equal(want["<ring>"][0], word(model, "a"))

    history = json.loads(Path("out/history.json").read_text(encoding="utf-8"))
    for row, (token, name) in zip(history["tokens"], want.classes.items(), strict=True):
        past = learner.history[name]
        about = {"token": token, "class": name, "losses": past.losses, "accuracies": past.accuracies}
        assert row == json.loads(json.dumps({**want.about[token], **about}))
    assert history["settings"] == {
        "model": "mini", "revision": None, "device": "cpu", "dtype": "float32", "classifier": "clip",
        **json.loads(json.dumps(asdict(config))),
    }  # fmt: skip
    about = want.about["<ring>"]
    line = next(line for line in done.stdout.splitlines() if "<ring>" in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[1:5] == ["ring", str(about["updates"]), about["ended"], f"{about['loss']:.4f}"]
    assert about["clamped"] == 1
    assert cells[7] == f"{about['norm']:.2f} (clamped)" == "1.50 (clamped)"
    assert f"ring: {counted(about['updates'], 'update')}, loss" in done.stderr
    assert "2 tokens, 2 of 2 at the norm clamp, " in done.stdout

    # The pictures: the plain text above, the token below, of the same noise.
    with Image.open("out/pictures/ring-token.png") as sheet:
        assert sheet.size == (2 * 256 + 4, 2 * 256 + 4)
        shown = np.asarray(sheet).astype(int)[::4, ::4]
    sampled = GenerateConfig(steps=2, guidance=2.0, scheduler="ddim")
    for row, text in enumerate(("a ring", "a <ring> ring")):
        pictures = dsd.generate(model, [text] * 2, sampled, seeds=[0, 1], tokens=want)
        for column, expected in enumerate(pictures):
            tile = shown[row * 65 : row * 65 + 64, column * 65 : column * 65 + 64]
            assert np.abs(tile - np.asarray(expected).astype(int)).max() <= 1

    seen = Seen(Path("out/report.html").read_text(encoding="utf-8"))
    assert "b" not in {tag for tag, _ in seen.tags}
    assert all(
        text in seen.text
        for text in ("a ring", "a <ring> ring", HOSTILE, f"{about['loss']:.4f}", "2 of 2 at the norm clamp")
    )
    assert len([tag for tag, _ in seen.tags if tag == "img"]) == 2

    again = cli("tokens", "show", "out", "--model", "mini", "--words", 1)
    assert again.exit_code == 0, again.stderr
    line = next(line for line in again.stdout.splitlines() if "<ring>" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")][3:6] == cells[2:5]
    assert "learned on mini" in again.stdout


def test_the_noise_loss_learns_from_folders_of_images(cli, model):
    for name, first in (("ring", 0), ("cross", 10)):
        for seed in range(first, first + 2):
            Path("data", name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene(seed).image).save(Path("data", name, f"{seed}.png"))
    options = ["--loss", "noise", "--data", "data", "--images", 2, "--updates", 2, "--vectors", 2, "--pictures", 0]
    options += ["--no-class-name", "--token", "*{}*", "--initial", "red ring"]
    options += ["--template", "a {}", "--template", "a photo of {}"]
    done = cli("tokens", "learn", *options, "--out", "out")
    assert done.exit_code == 0, done.stderr
    config = TokenConfig(
        loss="noise", images=2, updates=2, vectors=2, class_name=False, token="*{}*", initial="red ring",
        templates=("a {}", "a photo of {}"),
    )  # fmt: skip
    images = {name: sorted(Path("data", name).iterdir()) for name in ("cross", "ring")}
    want = ClassTokenLearner(model, None, config).learn(["cross", "ring"], images=images)
    got = LearnedTokens.load("out")
    assert list(got) == ["*cross*", "*ring*"]
    assert same(got, want)
    assert not Path("out/images").exists()
    part = cli("tokens", "learn", "ring", *options, "--out", "part")
    assert part.exit_code == 0, part.stderr
    assert list(LearnedTokens.load("part").classes.values()) == ["ring"]


def test_what_was_interrupted_goes_on_to_the_same_tokens(cli, monkeypatch):
    calls = []
    show = _Bars.__call__

    def interrupted(self, update):
        show(self, update)
        calls.append((update.name, update.update))
        if len(calls) == 3:
            raise KeyboardInterrupt

    command = ["tokens", "learn", "ring", "cross", "--classifier", "clip", "--together", 1, *SMALL, "--pictures", 1]
    whole = cli(*command, "--out", "whole")
    assert whole.exit_code == 0, whole.stderr
    monkeypatch.setattr(_Bars, "__call__", interrupted)
    stopped = cli(*command)
    assert stopped.exit_code == 130
    assert "interrupted; the same command goes on from what is in out" in stopped.stderr
    assert not Path("out/history.json").exists()
    done = cli(*command)
    assert done.exit_code == 0, done.stderr
    assert calls == [("ring", 1), ("ring", 2), ("cross", 1), ("cross", 2)]
    assert same(LearnedTokens.load("out"), LearnedTokens.load("whole"))
    kept = {name: json.loads(Path(name, "history.json").read_text())["tokens"] for name in ("out", "whole")}
    assert kept["out"] == kept["whole"]
    for name in ("pictures/ring-token.png", "ring-token.safetensors", "bank.safetensors", "tokens.json"):
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()
    refused = cli(*command, "--seed", 3)
    assert refused.exit_code == 2
    assert "differs in config.seed" in refused.stderr
    with locked(Path("out")):
        busy = cli(*command)
    assert busy.exit_code == 2
    assert "is being written by another process" in busy.stderr


def test_a_classifier_of_a_folder_with_targets_and_a_loss_that_is_no_number(cli, tmp_path):
    labels = {0: "red cross", 1: "one ring, circle", 2: "other"}
    settings = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 16}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**settings, **layers, id2label=labels, label2id={name: k for k, name in labels.items()})
    trained_like(ViTForImageClassification(config), 0).save_pretrained("vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("vit")
    command = ["tokens", "learn", "ring", "cross", "--classifier", "vit", *SMALL, "--pictures", 1]
    refused = cli(*command)
    assert refused.exit_code == 2
    assert "cross" in refused.stderr
    assert not Path("out").exists()
    Path("targets.json").write_text('{"ring": 1, "cross": "red cross"}')
    done = cli(*command, "--targets", "targets.json", "--learning-rate", 1e38)
    assert done.exit_code == 1, done.stderr
    assert "not-finite" in done.stdout
    tokens = LearnedTokens.load("out")
    assert tokens.settings["targets"] == [1, 0]
    assert all(vectors.isfinite().all() for vectors in tokens.values())


def test_bars_show_running_classes_and_lines_those_that_ended():
    display = progress("updates")
    console = display.live.console = Console(file=io.StringIO(), width=200)
    bars = _Bars(display, 10, 5)
    for number in range(9):
        bars(TokenUpdate(f"[/b]{number}\x1b", 2, 0.5, None, None, 1.0, 0.0, None))
    for number in (0, 8):
        bars(TokenUpdate(f"[/b]{number}\x1b", 3, 0.25, 0.5, 0.5, 1.0, 0.0, "gamma"))
    console.print(display.get_renderable())
    shown = console.file.getvalue()
    assert [number for number in range(9) if f"[/b]{number}\\x1b, loss 0.5000" in shown] == list(range(1, 8))
    assert all(f"[/b]{number}\\x1b: 3 updates, loss 0.2500, 50% right (gamma)" in shown for number in (0, 8))
    assert re.search(r"classes +.*2/10", shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ring"], "give a --classifier: clip, or"),
        (["--classifier", "clip"], "got no classes, expected CLASS, or --classes FILE"),
        (["ring", "--classes", "names.txt", "--classifier", "clip"], "--classes: given with CLASS"),
        (["--classes", "none.txt", "--classifier", "clip"], "none.txt"),
        (["--classes", "names.txt", "--classifier", "clip"], "classes: 'ring' is there more than once"),
        (["a b", "a_b", "--classifier", "clip"], "classes: 'a b' and 'a_b' both have the token '<a-b>'"),
        (["ring", "--loss", "noise"], "--loss noise needs --data"),
        (
            ["ring", "--loss", "noise", "--data", "data", "--classifier", "clip"],
            "--classifier: given with --loss noise",
        ),
        (["ring", "--loss", "noise", "--data", "data"], "--data: data has no folder 'ring'"),
        (["..", "--loss", "noise", "--data", "data"], "--data: data has no folder '..'"),
        (["cross", "--loss", "noise", "--data", "data"], "data/cross has no image"),
        (["ring", "--loss", "noise", "--data", "names.txt"], "--data: names.txt is no folder"),
        (["ring", "--data", "data", "--classifier", "clip"], "--data: given without --loss noise"),
        (["ring", "--classifier", "clip", "--targets", "names.txt"], "--targets: names.txt is no JSON"),
        (["ring", "--classifier", "clip", "--targets", "list.json"], "has a list, expected an object"),
        (["ring", "--classifier", "clip", "--updates", "0"], "updates: got 0, expected an integer of at least 1"),
        (["ring", "--classifier", "clip", "--template", "a ring"], "templates: got ('a ring',)"),
        (["ring", "--classifier", "clip", "--betas", "0.9"], "betas: got (0.9,), expected two numbers"),
        (["ring", "--classifier", "clip", "--betas", "a,b"], "--betas: 'a,b' is no pair of numbers"),
        (["ring", "--classifier", "clip", "--norm-clamp", "much"], "--norm-clamp: 'much' is neither a number nor none"),
        (["ring", "--classifier", "clip", "--runtime", "fast"], "runtime: got 'fast'"),
        (["ring", "--classifier", "clip", "--out", "names.txt"], "--out names.txt cannot be written: it is a file"),
    ],
)
def test_the_options_own_error_comes_first(cli, arguments, message):
    Path("names.txt").write_text("ring\nring\n")
    Path("list.json").write_text("[0]")
    Path("data/cross").mkdir(parents=True)
    done = cli("tokens", "learn", "--out", "out", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "loading" not in done.stderr
    assert not Path("out").exists()


def learned(model):
    """Tokens of one vector and of two, as if they had been learned."""
    ring, pair = word(model, "ring")[None], torch.stack([word(model, "red"), word(model, "circle")])
    return LearnedTokens(
        {"<ring>": ring, "<a:B>": pair},
        classes={"<ring>": "ring", "<a:B>": "a:B"},
        about={"<ring>": {"updates": 7, "ended": "gamma", "loss": 0.25, "accuracy": None, "norm": 1.5, "clamped": 0.5}},
        settings={"model": "\x1b[31mmini"},
    )


def test_show_names_the_nearest_words(cli, model):
    learned(model).save("out")
    plain = cli("tokens", "show", "out")
    assert plain.exit_code == 0, plain.stderr
    assert "loading" not in plain.stderr
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in plain.stdout.splitlines() if "│" in line]
    assert rows == [
        ["<ring>", "ring", "7", "gamma", "0.2500", "-", "-", "1.50 (clamped)"],
        ["<a:B>", "a:B", "-", "-", "-", "-", "-", "-"],
    ]
    assert "2 tokens, 1 of 2 at the norm clamp, learned on \\x1b[31mmini." in plain.stdout
    near = cli("tokens", "show", "out", "--model", "mini", "--words", 2).stdout
    table = model.text_encoders[0].get_input_embeddings().weight.detach().double()
    for vector in learned(model)["<a:B>"].double():
        cosines = {
            name.removesuffix("</w>"): float(torch.cosine_similarity(table[number], vector, dim=0))
            for name, number in model.tokenizers[0].get_vocab().items()
            if re.fullmatch("[A-Za-z]+</w>", name)
        }
        assert " ".join(sorted(cosines, key=cosines.get, reverse=True)[:2]) in near


def test_tokens_of_two_text_encoders_are_shown_by_the_first():
    model = dsd.from_pipeline(tiny_pipeline("sdxl"))
    first, second = (encoder.get_input_embeddings().weight.detach() for encoder in model.text_encoders)
    number = model.tokenizers[0].get_vocab()["r</w>"]
    tokens = LearnedTokens({"<r>": {"clip_l": 2 * first[[number]], "clip_g": second[:1]}})
    assert nearest_words(model, tokens, 1) == {"<r>": "r"}
    with pytest.raises(CommandError, match=f"is {first.shape[1]} wide, the tokens 3"):
        nearest_words(model, LearnedTokens({"<r>": torch.ones(1, 3)}), 1)


def test_tokens_that_came_from_elsewhere_are_not_replaced(cli, model):
    learned(model).save("out")
    done = cli("tokens", "learn", "ring", "cross", "--classifier", "clip", *SMALL)
    assert done.exit_code == 2
    assert "out: 'out' has tokens that were not learned there; give another folder" in " ".join(done.stderr.split())
    assert same(LearnedTokens.load("out"), learned(model))


def test_exported_files_are_what_other_programs_read(cli, model):
    """One tensor (v, E) a file under a name that a prompt of theirs can hold, and nothing else in the folder."""
    tokens = learned(model)
    tokens.save("tokens")
    done = cli("tokens", "export", "tokens", "--out", "embeddings")
    assert done.exit_code == 0, done.stderr
    names = {"ring-token.safetensors": "<ring>", "a_B-token.safetensors": "<a:B>"}
    assert {file.name for file in Path("embeddings").iterdir()} == set(names)
    for name, token in names.items():
        ((key, value),) = load_file(Path("embeddings", name)).items()
        assert key == token
        assert value.ndim == 2
        assert torch.equal(value, tokens[token])
        assert f"embedding:{Path(name).stem}" in done.stdout
    refused = cli("tokens", "export", "tokens", "--out", "embeddings", "--class", "ring")
    assert refused.exit_code == 2
    assert "ring-token.safetensors exists; give --overwrite" in refused.stderr
    Path("embeddings/ring-token.safetensors").write_bytes(b"")
    again = cli("tokens", "export", "tokens", "--out", "embeddings", "--class", "ring", "--overwrite")
    assert again.exit_code == 0, again.stderr
    pipe = dsd.load("mini").to_pipeline()
    pipe.load_textual_inversion([str(Path("embeddings", name)) for name in names])
    stock = pipe.encode_prompt("a <ring> and <a:B>", "cpu", 1, False)[0]
    assert torch.equal(stock, model.with_tokens(tokens).encode_prompts(["a <ring> and <a:B>"]).states)
    unknown = cli("tokens", "export", "tokens", "--out", "other", "--class", "none")
    assert unknown.exit_code == 2
    assert "--class: got 'none', expected one of the classes, ring, a:B" in unknown.stderr
