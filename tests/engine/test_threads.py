"""Requests under different adapters on one model in several threads: the answers of one after the other."""

import sys
import threading
import warnings

import peft
import pytest
import torch

import dsd_fast as dsd
from dsd_fast.engine import Engine
from dsd_fast.models.prompts import as_tokens, tokenize
from dsd_fast.unet import UNetProgram
from dsd_fast.unet.stream import HEADROOM
from tests.engine.test_engine import PROMPTS, latents
from tests.tiny import load_tiny_lora, tiny_pipeline, tiny_tokenizer

EARLY = "down-level1-repeat0-vit-out"
ROUNDS = 3
LONG = 60.0


@pytest.fixture
def model(tmp_path):
    """With a LoRA "x" in UNet and text encoder, and a LoHa "y" in the UNet."""
    pipe = tiny_pipeline("sd15")
    load_tiny_lora(pipe, "sd15", tmp_path, adapter_name="x")
    config = peft.LoHaConfig(r=2, alpha=8, target_modules=["to_k", "to_v"], init_weights=False)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        peft.inject_adapter_in_model(config, pipe.unet, "y")
    for part in (pipe.unet, pipe.text_encoder):
        part.requires_grad_(False).eval()
    return dsd.from_pipeline(pipe)


@pytest.fixture
def hurried():
    """Threads that take turns far more often than they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def predicted(model, adapter):
    """Texts and noise of one engine."""
    engine = Engine(model, adapter)

    def work():
        engine.forget()
        texts, text_of = engine.texts(PROMPTS)
        return engine.predict(texts, text_of)(latents(model, 3), 500)

    return work


def streamed(model, adapter):
    """A bare plan, row by row: between rows nothing is held."""
    plan = UNetProgram(model.unet).plan(features=[EARLY], adapter=adapter)
    z = latents(model, 3)

    def work():
        text = plan.encode_text(model.encode_prompts(PROMPTS).states.detach())
        budget = text.nbytes + HEADROOM["cpu"] * plan.run_bytes(1, *model.latent_size(), text.tokens)
        return torch.cat([out.features[EARLY] for _, out in plan.stream(z, 300, text, memory_budget=budget)])

    return work


def learned(model, adapter):
    """A gradient whose backward pass computes again, inside a block under something else."""
    plan, plain = (UNetProgram(model.unet).plan(features=[EARLY], adapter=names) for names in (adapter, ()))

    def work():
        states = model.encode_prompts(PROMPTS[:1]).states.detach().requires_grad_()
        out = plan.run(latents(model, 1), 100, plan.encode_text(states), checkpoint=True)
        with plain.active():
            return torch.autograd.grad(out.features[EARLY].square().sum(), states)[0]

    return work


def encoded(model, adapter):
    """The model's own calls, which know no adapters."""
    return lambda: model.encode_prompts(PROMPTS).states.detach()


@pytest.mark.newest
def test_answers_are_those_of_one_after_the_other(model, hurried):
    works = {
        (make, adapter): make(model, adapter)
        for make, adapter in (
            (predicted, "x"),
            (predicted, ()),
            (predicted, None),
            (streamed, "y"),
            (streamed, None),
            (learned, ("x", "y")),
            (encoded, None),
        )
    }
    # "x" is as strong as it was for those who named it.
    model.to_pipeline().set_adapters("x", 0.5)
    want = {key: work() for key, work in works.items()}
    assert len({tuple(value.flatten()[:4].tolist()) for value in want.values()}) == len(want)
    found, errors = {key: [] for key in works}, []

    def run(key):
        try:
            for _ in range(ROUNDS):
                found[key].append(works[key]())
        except BaseException as error:
            errors.append((key, error))

    threads = [threading.Thread(target=run, args=(key,), daemon=True) for key in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    for key, answers in found.items():
        assert len(answers) == ROUNDS
        assert all(torch.equal(answer, want[key]) for answer in answers), key
    assert {value for layers in Engine(model).adapters.strengths() for [(_, value)] in layers.values()} == {0.5}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_tokenizers_are_for_one_thread_at_a_time(hurried, count):
    tokenizer = tiny_tokenizer()
    limit = tokenizer.model_max_length
    texts = PROMPTS * 16
    want, length, wrong = tokenize(tokenizer, texts, limit)[0], len(as_tokens(tokenizer, PROMPTS[0]).input_ids), []

    def padded():
        for _ in range(40):
            wrong.extend([] if torch.equal(tokenize(tokenizer, texts, limit)[0], want) else ["padded"])

    def bare():
        for _ in range(40):
            wrong.extend([] if len(as_tokens(tokenizer, PROMPTS[0]).input_ids) == length else ["bare"])

    threads = [threading.Thread(target=padded if number % 2 else bare, daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
