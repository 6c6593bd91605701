"""Learned tokens: what stock pipelines make of the same files, beside a model that stays as it was."""

import copy

import pytest
import torch
from safetensors.torch import save_file

import dsd_fast as dsd
from dsd_fast.engine import Engine, LearnedTokens
from dsd_fast.engine.fingerprint import model_settings
from dsd_fast.models import ModelError
from tests.tiny import tiny_pipeline

PROMPT = "a photo of <cat>, and <dog>"
WIDTHS = {"sd15": (24,), "sdxl": (24, 32)}


def vectors(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def stock_states(pipe, prompt):
    states, _, *pooled = pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return states, pooled[0] if pooled else None


@pytest.fixture(scope="module")
def pipes():
    return {family: tiny_pipeline(family) for family in WIDTHS}


@pytest.fixture
def pipe(pipes):
    return pipes["sd15"]


@pytest.mark.parametrize("family", WIDTHS)
@torch.no_grad()
def test_states_are_those_of_a_stock_pipeline_and_the_model_stays(family, pipes, tmp_path):
    pipe, model = pipes[family], dsd.from_pipeline(pipes[family])
    before, size = stock_states(pipe, PROMPT), len(pipe.tokenizer)
    names = ("clip_l", "clip_g")[: len(WIDTHS[family])]
    learned = {
        token: {name: vectors(count, width, count) for name, width in zip(names, WIDTHS[family], strict=True)}
        for token, count in (("<cat>", 3), ("<dog>", 1))
    }
    for token, parts in learned.items():
        save_file(parts if family == "sdxl" else {token: parts["clip_l"]}, tmp_path / f"{token}.safetensors")
    random = torch.get_rng_state()
    ours = model.with_tokens(tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    got = ours.encode_prompts([PROMPT])

    stock = ours.to_pipeline()
    fresh = tiny_pipeline(family)
    for name, tokenizer, encoder in zip(
        names, ("tokenizer", "tokenizer_2"), ("text_encoder", "text_encoder_2"), strict=False
    ):
        fresh.load_textual_inversion(
            [parts[name] for parts in learned.values()],
            token=list(learned),
            tokenizer=getattr(fresh, tokenizer),
            text_encoder=getattr(fresh, encoder),
        )
        assert getattr(stock, tokenizer).get_vocab() == getattr(fresh, tokenizer).get_vocab()
        assert getattr(stock, encoder).config.vocab_size == getattr(fresh, encoder).config.vocab_size
    for pipeline in (fresh, stock):
        states, pooled = stock_states(pipeline, PROMPT)
        assert torch.equal(got.states, states)
        assert pooled is None or torch.equal(got.pooled, pooled)
    plain = model.encode_prompts(["a photo of , and"]).lengths
    assert (got.lengths - plain).tolist() == [4]

    assert torch.equal(stock_states(pipe, PROMPT)[0], before[0])
    assert torch.equal(model.encode_prompts([PROMPT]).states, before[0])
    assert len(pipe.tokenizer) == size == pipe.text_encoder.config.vocab_size
    assert (got.states - before[0]).abs().max() > 0.01
    own, shared = (next(m.text_encoders[0].encoder.parameters()) for m in (ours, model))
    assert own.data_ptr() == shared.data_ptr()
    assert model_settings(Engine(ours)) != model_settings(Engine(model))


@torch.no_grad()
def test_files_of_every_layout_name_a_token(pipe, tmp_path):
    value, model = vectors(2, 24), dsd.from_pipeline(pipe)
    save_file({"<cat>": value}, tmp_path / "learned_embeds.safetensors")
    save_file({"emb_params": value}, tmp_path / "<dog>.safetensors")
    (tmp_path / "alone").mkdir()
    save_file({"*": value[0]}, tmp_path / "alone" / "<bird>.safetensors")
    both = model.with_tokens([tmp_path, tmp_path / "alone"])
    size = len(model.tokenizers[0])
    added = {"<cat>": 1, "<cat>_1": 2, "<dog>": -1, "<dog>_1": 0, "<bird>": 3}
    vocabulary = both.tokenizers[0].get_vocab()
    assert {name: vocabulary[name] - size - 1 for name in added} == added
    want = model.with_tokens({"<cat>": value, "<dog>": value.numpy(), "<bird>": value[0]})
    prompts = [PROMPT, "<bird>"]
    assert torch.equal(both.encode_prompts(prompts).states, want.encode_prompts(prompts).states)
    # What has tokens takes more.
    more = model.with_tokens(tmp_path).with_tokens(tmp_path / "alone")
    assert torch.equal(both.encode_prompts(prompts).states, more.encode_prompts(prompts).states)


@torch.no_grad()
def test_files_for_one_of_two_encoders_go_where_they_fit(pipes, tmp_path):
    model = dsd.from_pipeline(pipes["sdxl"])
    first, second = vectors(2, 24), vectors(2, 32)
    # As diffusers' script for SDXL writes them.
    save_file({"<cat>": first}, tmp_path / "learned_embeds.safetensors")
    save_file({"<cat>": second}, tmp_path / "learned_embeds_2.safetensors")
    got = model.with_tokens(tmp_path).encode_prompts(["a <cat>"])
    want = model.with_tokens({"<cat>": {"clip_l": first, "clip_g": second}}).encode_prompts(["a <cat>"])
    assert torch.equal(got.states, want.states)
    alone = model.with_tokens({"<cat>": first})
    assert alone.tokenizers[1] is model.tokenizers[1]
    assert alone.text_encoders[1] is model.text_encoders[1]


@torch.no_grad()
def test_where_the_largest_token_was_the_end_the_pooled_state_is_the_stock_pipelines_or_the_ends():
    pipe, tokens = tiny_pipeline("sdxl"), {"<cat>": vectors(1, 32)}
    at_end = dsd.from_pipeline(pipe).with_tokens(tokens).encode_prompts(["a <cat>"])
    pipe.text_encoder_2.config.eos_token_id = 2
    for module in pipe.text_encoder_2.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = 2
    model = dsd.from_pipeline(pipe)
    learned = {pooled: LearnedTokens(tokens, pooled=pooled) for pooled in ("stock", "end")}
    got = {pooled: model.with_tokens(each) for pooled, each in learned.items()}
    assert torch.equal(got["end"].encode_prompts(["a <cat>"]).pooled, at_end.pooled)
    assert torch.equal(got["end"].encode_prompts(["a cat"]).pooled, model.encode_prompts(["a cat"]).pooled)
    stock = got["stock"].encode_prompts(["a <cat>"])
    assert torch.equal(model.with_tokens(tokens).encode_prompts(["a <cat>"]).pooled, stock.pooled)
    assert torch.equal(
        model.with_tokens(learned["stock"], pooled="end").encode_prompts(["a <cat>"]).pooled, at_end.pooled
    )
    for pooled, each in learned.items():
        fresh = copy.deepcopy(pipe)
        each.load_into(fresh)
        assert torch.equal(stock_states(fresh, "a <cat>")[1], got[pooled].encode_prompts(["a <cat>"]).pooled)
    assert (stock.pooled - at_end.pooled).abs().max() > 0.1
    with pytest.raises(ValueError, match="pooled: got 'first', expected one of stock, end"):
        model.with_tokens(tokens, pooled="first")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "tokens: {} has none"),
        ({"<cat>": torch.zeros(2, 25)}, r"token '<cat>' has vectors of \(2, 25\) torch.float32, expected .* 24\)"),
        ({"<cat>": torch.zeros(0, 24)}, r"vectors of \(0, 24\)"),
        ({"<cat>": torch.zeros(24, dtype=torch.int64)}, r"vectors of \(1, 24\) torch.int64, expected floats"),
        ({"<cat>": torch.full((24,), float("nan"))}, "has vectors with infinite numbers, or that are none"),
        ({"<cat>": {"clip_g": torch.zeros(24)}}, "has vectors for clip_g, expected for clip_l"),
        ({"red</w>": torch.zeros(24)}, "token 'red</w>' is in the tokenizer's vocabulary"),
        ({"a cat": torch.zeros(24)}, "token is 'a cat', expected a name without spaces"),
        ({"": torch.zeros(24)}, "token is '', expected a name without spaces"),
        ({"<cat>": torch.zeros(2, 24), "<cat>_1": torch.zeros(24)}, "token '<cat>_1' is in .* or given twice"),
        (
            {"<cat>": torch.zeros(24), "<cat>_1": torch.zeros(24)},
            "'<cat>' would be taken for a part of token '<cat>_1'",
        ),
        ({"cat2": torch.zeros(2, 24), "bigcat2": torch.zeros(24)}, "'cat2' would be taken for a part of .*'bigcat2'"),
        ({"<Cat>": torch.zeros(24), "<cat>": torch.zeros(24)}, "token '<.at>' is not read as a word of its own"),
        ("missing.safetensors", "tokens file 'missing.safetensors' does not exist"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(pipe, source, message):
    with pytest.raises(ModelError, match=message):
        dsd.from_pipeline(pipe).with_tokens(source)


def test_files_that_do_not_fit_are_refused(pipe, tmp_path):
    model = dsd.from_pipeline(pipe)
    with pytest.raises(ModelError, match=r"has no \.safetensors file"):
        model.with_tokens(tmp_path)
    torch.save({"<cat>": torch.zeros(24)}, tmp_path / "cat.bin")
    with pytest.raises(ModelError, match="may be a pickle"):
        model.with_tokens(tmp_path / "cat.bin")
    (tmp_path / "cat.safetensors").write_bytes(b"none")
    with pytest.raises(ModelError, match="cannot be read"):
        model.with_tokens(tmp_path)
    save_file({"<a>": torch.zeros(24), "<b>": torch.zeros(24)}, tmp_path / "cat.safetensors")
    with pytest.raises(ModelError, match=r"has 2 tensors \(<a>, <b>\), expected one token's"):
        model.with_tokens(tmp_path)
    save_file({"<a>": torch.zeros(24)}, tmp_path / "cat.safetensors")
    with pytest.raises(ModelError, match="has vectors for token '<a>', which another one gave before"):
        model.with_tokens([tmp_path, tmp_path / "cat.safetensors"])
