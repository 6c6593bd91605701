"""The noise loss against stock diffusers, in micro-batches, and where its gradients go."""

from dataclasses import replace

import pytest
import torch

import dsd_fast as dsd
from dsd_fast.engine import Engine
from dsd_fast.engine.noise_loss import NoiseLoss, draw_row
from tests.tiny import tiny_pipeline

SIDE = 8


def parts(kind):
    pipe = tiny_pipeline("sd15", prediction_type=kind)
    pipe.unet.double().requires_grad_(False)
    pipe.unet.register_to_config(sample_size=SIDE)
    model = dsd.from_pipeline(pipe)
    random = torch.Generator().manual_seed(0)
    rows = [draw_row(random, (0, 1000), (4, SIDE, SIDE)) for _ in range(3)]
    clean = torch.randn(3, 4, SIDE, SIDE, generator=random, dtype=torch.float64)
    times, noise = torch.tensor([time for time, _ in rows]), torch.stack([noise for _, noise in rows])
    texts = model.encode_prompts(["a cat", "a red dog"])
    return model, replace(texts, states=texts.states.detach().double()), clean, times, noise


def right(model, texts, text_of, clean, times, noise, kind):
    alphas = model.schedule.alphas_cumprod[times].view(-1, 1, 1, 1)
    noised = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": alphas.sqrt() * noise - (1 - alphas).sqrt() * clean}
    told = model.unet(noised, times, texts.states[text_of]).sample
    return (told - wanted[kind].double()).square().mean((1, 2, 3))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_it_is_diffusers_loss_for_what_the_network_predicts(kind):
    model, texts, clean, times, noise = parts(kind)
    text_of = torch.tensor([1, 0, 1])
    found = NoiseLoss(Engine(model))(texts, text_of, clean, times, noise)
    assert not found.requires_grad
    # float64.
    torch.testing.assert_close(found, right(model, texts, text_of, clean, times, noise, kind), rtol=1e-11, atol=0)


@pytest.mark.parametrize("learned", ["weights", "texts", "both"])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "one by one"])
def test_gradients_go_to_weights_and_texts_in_any_number_of_parts(learned, apart, monkeypatch):
    model, texts, clean, times, noise = parts("epsilon")
    engine, text_of = Engine(model), torch.tensor([1, 0, 1])
    if apart:
        monkeypatch.setattr(Engine, "rows_differentiated", lambda self, texts: 1)
    weights = [p for name, p in model.unet.named_parameters() if name.endswith("attn2.to_v.weight")]
    leaves = [*(weights if learned != "texts" else []), *([texts.states] if learned != "weights" else [])]
    for leaf in leaves:
        leaf.requires_grad_(True)
    calls = []

    def backward(squares):
        calls.append(float(squares.detach()))
        squares.backward()

    told = NoiseLoss(engine)(texts, text_of, clean, times, noise, backward)
    assert len(calls) == (3 if apart else 1)
    assert sum(calls) == pytest.approx(float(told.sum()) * clean[0].numel(), rel=1e-12)
    slopes = torch.autograd.grad(
        right(model, texts, text_of, clean, times, noise, "epsilon").sum() * clean[0].numel(), leaves
    )
    for leaf, slope in zip(leaves, slopes, strict=True):
        assert slope.abs().max() > 0
        torch.testing.assert_close(leaf.grad, slope, rtol=1e-9, atol=1e-9 * float(slope.abs().max()))
