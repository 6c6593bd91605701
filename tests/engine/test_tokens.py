"""Learned tokens and their files: what comes back, what stock pipelines read, and no folder that is half of two."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dsd_fast as dsd
from dsd_fast.engine import LearnedTokens, tokens
from dsd_fast.models import ModelError
from tests.tiny import tiny_pipeline

PROMPT = "a photo of <cat>, and <dog>"
WIDTHS = {"sd15": (24,), "sdxl": (24, 32)}


def made(family="sd15", **changed):
    generator = torch.Generator().manual_seed(0)
    vectors = {
        token: {name: torch.randn(count, width, generator=generator) for name, width in zip(names, widths, strict=True)}
        for names, widths in [(("clip_l", "clip_g")[: len(WIDTHS[family])], WIDTHS[family])]
        for token, count in (("<cat>", 2), ("<dog>", 1))
    }
    if family == "sd15":
        vectors = {token: parts["clip_l"] for token, parts in vectors.items()}
    options = {
        "classes": {"<cat>": "Katze, groß"},
        "about": {"<cat>": {"updates": 7, "ended": "accuracy"}},
        "settings": {"model": "tiny", "config": {"steps": 3}},
    }
    return LearnedTokens(vectors, **options | changed)


def same(a, b):
    def parts(value):
        return value if isinstance(value, dict) else {"": value}

    return list(a) == list(b) and all(
        parts(a[token]).keys() == parts(b[token]).keys()
        and all(torch.equal(value, parts(b[token])[name]) for name, value in parts(a[token]).items())
        for token in a
    )


@pytest.mark.parametrize("family", WIDTHS)
@torch.no_grad()
def test_what_was_saved_is_read_by_models_and_by_a_stock_pipeline(family, tmp_path):
    learned, pipe = made(family), tiny_pipeline(family)
    model = dsd.from_pipeline(pipe)
    learned.save(tmp_path)
    read = LearnedTokens.load(tmp_path)
    assert same(read, learned)
    assert (read.classes, read.about, read.settings, read.pooled) == (
        {"<cat>": "Katze, groß", "<dog>": "<dog>"},
        {"<cat>": {"updates": 7, "ended": "accuracy"}, "<dog>": {}},
        {"model": "tiny", "config": {"steps": 3}},
        "stock",
    )
    want = model.with_tokens(learned).encode_prompts([PROMPT])
    alone = [tmp_path / "cat-token.safetensors", tmp_path / "dog-token.safetensors"]
    for source in (tmp_path, tmp_path / "bank.safetensors", alone, read):
        got = model.with_tokens(source).encode_prompts([PROMPT])
        assert torch.equal(got.states, want.states)
    read.load_into(pipe)
    states, _, *pooled = pipe.encode_prompt(
        PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert torch.equal(states, want.states)
    assert not pooled or torch.equal(pooled[0], want.pooled)
    # One tensor under any key, or clip_l and clip_g: what the embeddings folders of A1111 and ComfyUI read.
    assert set(load_file(alone[0])) == ({"<cat>"} if family == "sd15" else {"clip_l", "clip_g"})
    shown = json.loads((tmp_path / "tokens.json").read_text())["tokens"]["<cat>"]
    assert shown == {"class": "Katze, groß", "file": "cat-token.safetensors", "updates": 7, "ended": "accuracy"}


def test_a_folder_takes_other_tokens_in_place_of_the_older_and_leaves_what_is_not_its_own(tmp_path):
    made().save(tmp_path)
    (tmp_path / "other.txt").write_text("mine")
    learned = made().subset(["<dog>"])
    learned.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "bank.safetensors",
        "dog-token.safetensors",
        "other.txt",
        "tokens.json",
    ]
    assert same(LearnedTokens.load(tmp_path), learned)
    # A1111 takes a file of one tensor for a token of the file's name.
    assert len(load_file(tmp_path / "bank.safetensors")) == 2
    # Those of another are read as well.
    LearnedTokens({"<bird>": torch.ones(24)}).write_files(tmp_path)
    both = dsd.from_pipeline(tiny_pipeline("sd15")).with_tokens(tmp_path)
    assert {"<bird>", "<dog>"} <= both.tokenizers[0].get_vocab().keys()


def test_a_folder_that_could_not_be_finished_is_of_the_older_tokens_or_of_the_newer(tmp_path, monkeypatch):
    model, newer = (
        dsd.from_pipeline(tiny_pipeline("sd15")),
        LearnedTokens(dict.fromkeys(("<cat>", "<red>"), torch.ones(24))),
    )
    rename, stop = os.replace, ["bank", "cat-token", "red-token", "tokens"]

    def full(source, target):
        if Path(target).stem == stop[0]:
            raise OSError("no space left on device")
        rename(source, target)

    for want in (made(), newer, newer, newer):
        made().save(tmp_path / stop[0])
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OSError, match="no space left"):
                newer.save(tmp_path / stop[0])
        assert same(LearnedTokens.load(tmp_path / stop[0]), want)
        got, known = (model.with_tokens(source) for source in (tmp_path / stop[0], want))
        assert got.tokenizers[0].get_vocab() == known.tokenizers[0].get_vocab()
        prompts = [" and ".join(want)]
        assert torch.equal(got.encode_prompts(prompts).states, known.encode_prompts(prompts).states)
        newer.save(tmp_path / stop[0])
        assert {file.stem for file in (tmp_path / stop[0]).iterdir()} == {"bank", "cat-token", "red-token", "tokens"}
        stop.pop(0)


def test_names_of_files_are_safe_and_no_two_are_alike():
    vectors = {
        token: torch.ones(1, 24)
        for token in ("<bank>", "bank", "BANK", "<a/../b>", "a b", "..", "<éléphant>", "<(x:1)>", "<" + "ü" * 300 + ">")
    }
    files = LearnedTokens(vectors).files()
    assert list(files.values())[:8] == [
        "bank-token.safetensors",
        "bank-2.safetensors",
        "BANK-3.safetensors",
        "a_.._b-token.safetensors",
        "a_b.safetensors",
        "token.safetensors",
        "éléphant-token.safetensors",
        "x_1-token.safetensors",
    ]
    assert all(len(file.encode()) < 200 for file in files.values())


def test_some_are_taken_by_token_or_by_class():
    learned = made()
    got = learned.subset(["<dog>", "Katze, groß"])
    assert list(got) == ["<dog>", "<cat>"]
    assert got.about["<cat>"] == learned.about["<cat>"]
    with pytest.raises(KeyError, match="mouse"):
        learned.subset(["mouse"])


def test_vectors_are_kept_as_they_were_when_given():
    value = torch.ones(24, dtype=torch.float16, requires_grad=True)
    learned = LearnedTokens({"<cat>": value})
    with torch.no_grad():
        value.zero_()
    assert torch.equal(learned["<cat>"], torch.ones(1, 24))
    assert not learned["<cat>"].requires_grad


def test_what_is_no_bank_of_tokens_is_refused(tmp_path):
    learned = made()
    learned.save(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        LearnedTokens.load(tmp_path / "none")
    with pytest.raises(ModelError, match="is no bank of tokens"):
        LearnedTokens.load(tmp_path / "cat-token.safetensors")
    tokens.write_tensors(tmp_path / "bank.safetensors", {"<cat>": torch.ones(1, 24)}, {"tokens": ["<dog>"]})
    with pytest.raises(ModelError, match="has no vectors for its token '<dog>'"):
        LearnedTokens.load(tmp_path)
    for wrong in (torch.ones(2, 3, 4), torch.ones(24, dtype=torch.int64), torch.ones(0, 24)):
        with pytest.raises(ValueError, match=r"token '<cat>': got vectors of .*, expected floats"):
            LearnedTokens({"<cat>": wrong})
    with pytest.raises(ValueError, match="pooled: got 'mean', expected one of stock, end"):
        LearnedTokens({}, pooled="mean")
    with pytest.raises(ModelError, match=r"expected floats \(vectors, 24\)"):
        LearnedTokens({"<cat>": torch.ones(25)}).load_into(tiny_pipeline("sd15"))
