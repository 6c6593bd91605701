"""Texts with vectors of the caller's: what tables with these vectors give, and their gradient alone."""

import pytest
import torch

import dsd_fast as dsd
from dsd_fast.engine import Engine
from dsd_fast.models import ModelError, Splice
from tests.tiny import load_tiny_lora, tiny_pipeline

PROMPTS = ["a photo of <cat>, and <dog>", "red <dog>", "plain"]
TOKENS = {"<cat>": 2, "<dog>": 1}


@pytest.fixture(scope="module")
def models():
    return {family: dsd.from_pipeline(tiny_pipeline(family)) for family in ("sd15", "sdxl")}


@pytest.fixture
def model(models):
    return models["sd15"]


def banks(spliced, dtype=torch.float32):
    made = torch.Generator().manual_seed(0)
    return [torch.randn(3, width, generator=made).to(dtype).requires_grad_() for width in spliced.widths]


def learned(spliced, own):
    names = ("clip_l", "clip_g")[: len(own)]
    return {
        token: {name: bank[rows].detach() for name, bank in zip(names, own, strict=True)}
        for token, rows in spliced.rows.items()
    }


def loss(states):
    total = states.states.sin().sum()
    return total if states.pooled is None else total + states.pooled.sin().sum()


@pytest.mark.parametrize("pooled", ["stock", "end"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_states_and_gradients_are_those_of_tables_with_these_vectors(family, pooled, models):
    model = models[family]
    # As SDXL's encoder has it, so that the two ways to pool differ.
    ends = [(m, m.eos_token_id) for e in model.text_encoders for m in e.modules() if hasattr(m, "eos_token_id")]
    for module, _ in ends:
        module.eos_token_id = 2
    before = model.encode_prompts(PROMPTS[2:]).states
    spliced = Splice(model, TOKENS, pooled)
    own = banks(spliced)
    spliced.put(*own)
    stock = model.with_tokens(learned(spliced, own), pooled)
    tables = [encoder.get_input_embeddings().weight.requires_grad_() for encoder in stock.text_encoders]
    got, want = spliced.model.encode_prompts(PROMPTS), stock.encode_prompts(PROMPTS)
    assert torch.equal(got.states, want.states)
    assert torch.equal(got.token_ids, want.token_ids)
    assert got.pooled is None or torch.equal(got.pooled, want.pooled)
    gradients = torch.autograd.grad(loss(got), own)
    for gradient, table in zip(gradients, torch.autograd.grad(loss(want), tables), strict=True):
        # Summed in another order, over as many positions.
        torch.testing.assert_close(gradient, table[-3:], rtol=1e-5, atol=1e-5 * float(table[-3:].abs().max()))
        assert gradient.abs().max() > 1e-3
    assert torch.equal(model.encode_prompts(PROMPTS[2:]).states, before)
    assert not any(parameter.grad is not None for encoder in model.text_encoders for parameter in encoder.parameters())
    for module, end in ends:
        module.eos_token_id = end


def test_a_change_of_the_vectors_moves_texts_that_name_them_alone(model):
    spliced = Splice(model, TOKENS)
    assert spliced.model.encode_prompts(PROMPTS).states.isnan().any(2).any(1).tolist() == [True, True, False]
    (bank,) = banks(spliced)
    spliced.put(bank)
    first = spliced.model.encode_prompts(PROMPTS).states
    with torch.no_grad():
        # The vectors are the caller's, whose optimiser writes to them.
        bank[spliced.rows["<cat>"]] += 1
    moved = spliced.model.encode_prompts(PROMPTS).states
    assert [torch.equal(a, b) for a, b in zip(first, moved, strict=True)] == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_encoder_of_another_type_reads_vectors_in_its_own(dtype):
    pipe = tiny_pipeline("sd15")
    pipe.text_encoder.to(dtype)
    spliced = Splice(dsd.from_pipeline(pipe), TOKENS)
    (bank,) = banks(spliced)
    spliced.put(bank)
    states = spliced.model.encode_prompts(PROMPTS).states
    assert states.dtype == dtype
    (gradient,) = torch.autograd.grad(states.sin().sum(), bank)
    assert gradient.dtype == bank.dtype
    assert gradient.isfinite().all()


def test_adapters_of_the_encoders_keep_working(tmp_path):
    pipe = tiny_pipeline("sd15")
    load_tiny_lora(pipe, "sd15", tmp_path, adapter_name="x")
    model, found = dsd.from_pipeline(pipe), {}
    spliced = Splice(model, TOKENS)
    (bank,) = banks(spliced)
    spliced.put(bank)
    stock = model.with_tokens(learned(spliced, [bank]))
    for adapter in ("x", ()):
        with torch.no_grad(), Engine(spliced.model, adapter).adapters.active(texts_only=True):
            found[adapter] = spliced.model.encode_prompts(PROMPTS).states
        assert torch.equal(found[adapter], Engine(stock, adapter).encode_prompts(PROMPTS).states)
    assert (found["x"] - found[()]).abs().max() > 0.1


def test_texts_of_many_tokens_need_one_table_of_them(model, monkeypatch):
    """A tokenizer makes it anew each time that it is asked."""
    spliced, asked = Splice(model, {f"<{number}>": 2 for number in range(9)}), []
    kind = type(spliced.model.tokenizers[0])
    table = kind.added_tokens_encoder.fget
    monkeypatch.setattr(kind, "added_tokens_encoder", property(lambda self: asked.append(1) or table(self)))
    spliced.model.encode_prompts([f"red <{number}>" for number in range(9)])
    assert len(asked) == 1


def test_tokens_begin_as_words(models):
    spliced = Splice(models["sdxl"], TOKENS)
    for model_table, one, two, mean in zip(
        (encoder.get_input_embeddings().weight for encoder in models["sdxl"].text_encoders),
        spliced.initial("<dog>", "cat"),
        spliced.initial("<cat>", "cat dog"),
        spliced.initial("<dog>", "cat dog"),
        strict=True,
    ):
        ids = [models["sdxl"].tokenizers[0](word)["input_ids"][1] for word in ("cat", "dog")]
        assert torch.equal(one, model_table[ids[:1]])
        assert torch.equal(two, model_table[ids])
        torch.testing.assert_close(mean[0], model_table[ids].mean(0))
    three = spliced.initial("<cat>", "cat dog cat")[0]
    assert torch.equal(three[0], three[1])
    tables = [encoder.get_input_embeddings().weight for encoder in models["sdxl"].text_encoders]
    assert spliced.vocabulary_norms() == pytest.approx([float(table.norm(dim=1).mean()) for table in tables])
    with pytest.raises(ValueError, match="initial: got ' ', which has no token, expected words"):
        spliced.initial("<dog>", " ")


def test_what_does_not_fit_is_refused(model):
    spliced = Splice(model, TOKENS)
    for wrong, message in (
        ((), "banks: got 0 for 1 text encoders, expected one for each"),
        ((torch.zeros(2, 24),), r"banks\[0\]: got \(2, 24\) torch.float32, expected floats \(3, 24\)"),
        ((torch.zeros(3, 24, dtype=torch.int64),), r"banks\[0\]: got \(3, 24\) torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            spliced.put(*wrong)
    with pytest.raises(ModelError, match="is in the tokenizer's vocabulary, or given twice"):
        Splice(model, {"red</w>": 1})
    for tokens in ({}, {"<cat>": 0}):
        with pytest.raises(ValueError, match="expected at least one, of at least one vector each"):
            Splice(model, tokens)
    with pytest.raises(ValueError, match="pooled: got 'last', expected one of stock, end"):
        Splice(model, TOKENS, "last")
