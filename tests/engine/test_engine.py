"""Texts, adapters and predictions as every method uses them, on a tiny pipeline."""

import pytest
import torch

import dsd_fast as dsd
from dsd_fast.engine import Engine
from dsd_fast.unet.adapters import strengths_summary
from tests.tiny import load_tiny_lora, tiny_pipeline

PROMPTS = ["a red circle", "a blue square", "a red circle"]


@pytest.fixture(params=["sd15", "sdxl"])
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture
def adapted(tmp_path):
    pipe = tiny_pipeline("sd15")
    load_tiny_lora(pipe, "sd15", tmp_path, adapter_name="x")
    return pipe


class Calls:
    """Rows through a module while ``with`` lasts."""

    def __init__(self, module):
        self.rows = []
        self.handle = module.register_forward_hook(lambda m, args, out: self.rows.append(len(args[0])))

    def __enter__(self):
        return self.rows

    def __exit__(self, *_):
        self.handle.remove()


def token_embedding(pipe):
    return pipe.text_encoder.get_input_embeddings()


def latents(model, count, seed=0):
    shape = (count, model.latent_channels, *model.latent_size())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_equal_prompts_are_one_text_and_none_is_the_absent_one(pipe):
    model = dsd.from_pipeline(pipe)
    texts, numbers = Engine(model).texts([PROMPTS[0], None, *PROMPTS[1:]])
    assert numbers.tolist() == [0, 2, 1, 0]
    with torch.no_grad():
        want = model.encode_prompts(PROMPTS[:2]).followed_by(model.encode_unconditional())
    assert torch.equal(texts.chosen().states, want.states)
    if want.pooled is not None:
        assert torch.equal(texts.chosen().pooled, want.pooled)


def test_states_are_remembered_until_they_are_forgotten(pipe):
    engine = Engine(dsd.from_pipeline(pipe))
    with Calls(token_embedding(pipe)) as rows:
        engine.texts(PROMPTS)
        engine.texts(PROMPTS)
        assert rows == [2]
        engine.forget()
        engine.texts(PROMPTS)
        assert rows == [2, 2]


def test_a_view_shares_states_where_the_encoders_have_the_same_adapters(adapted):
    engine = Engine(dsd.from_pipeline(adapted), ())
    with Calls(token_embedding(adapted)) as rows:
        plain = engine.texts(PROMPTS)[0].chosen().states
        assert torch.equal(engine.under(()).texts(PROMPTS)[0].chosen().states, plain)
        assert rows == [2]
        other = engine.under("x").texts(PROMPTS)[0].chosen().states
        assert rows == [2, 2]
    assert not torch.equal(other, plain)


def told(engine):
    return [strengths_summary(layers) for layers in engine.adapters.strengths()]


def test_adapters_are_active_inside_and_as_before_outside(adapted):
    model = dsd.from_pipeline(adapted)
    engine = Engine(model, "x")
    adapted.set_adapters("x", 0.25)
    assert told(engine) == [{"x": [1.0]}, {"x": [1.0]}]
    assert told(Engine(model)) == [{"x": [0.25]}, {"x": [0.25]}]
    assert told(Engine(model, ())) == [{}, {}]
    with pytest.raises(RuntimeError, match="inside"), engine.adapters.active():
        raise RuntimeError("inside")
    assert told(Engine(model)) == [{"x": [0.25]}, {"x": [0.25]}]


def test_an_adapter_that_no_part_has_is_refused(adapted):
    with pytest.raises(ValueError, match="adapter: the model has no adapter 'y'; it has x"):
        Engine(dsd.from_pipeline(adapted), "y")


@pytest.mark.parametrize("roomy", [True, False], ids=["one group of texts", "a group for each text"])
def test_predictions_are_those_of_the_stock_network(pipe, roomy):
    model = dsd.from_pipeline(pipe)
    prompts = [PROMPTS[0], None, PROMPTS[1]]
    engine = Engine(model)
    if not roomy:
        plan = engine.plan(noise_pred=True)
        keys = engine.texts(PROMPTS[:1])[0].keys(plan).nbytes
        tokens = model.tokenizers[0].model_max_length
        engine = Engine(model, memory_budget=plan.run_bytes(1, *model.latent_size(), tokens) + keys)
    texts, text_of = engine.texts(prompts)
    z = latents(model, 3)
    out = engine.predict(texts, text_of)(z, 500)
    states = texts.chosen()
    added = {}
    if states.pooled is not None:
        ids = model.time_ids(*model.image_size).expand(3, -1)
        added = {"added_cond_kwargs": {"text_embeds": states.pooled[text_of], "time_ids": ids}}
    with torch.no_grad():
        want = pipe.unet(z, 500, states.states[text_of], **added).sample
    # float32 sums in another order.
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_keys_are_made_once_for_all_timesteps(pipe):
    model = dsd.from_pipeline(pipe)
    engine = Engine(model)
    texts, text_of = engine.texts(PROMPTS)
    predict = engine.predict(texts, text_of)
    to_k = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    with Calls(to_k) as rows:
        for t in (900, 500, 100):
            predict(latents(model, 3), t)
    assert rows == [2]


def test_a_size_that_is_no_multiple_is_refused(pipe):
    model = dsd.from_pipeline(pipe)
    with pytest.raises(ValueError, match="image_size: got "):
        Engine(model, image_size=(model.image_size[0] + 1, model.image_size[1]))
