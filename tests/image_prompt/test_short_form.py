"""An image prompt's short form, in which one state stands for all equal ones, against all of its states."""

import pytest
import torch

from dsd_fast.engine.image_prompts import ImagePrompt
from dsd_fast.unet import UNetProgram
from tests.tiny import CROSS_ATTENTION_DIM, POOLED_DIM, tiny_unet


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prompts(family, ends, alpha=0.0):
    """Three images whose texts end at those places, each state of the length that trained encoders give."""
    width = CROSS_ATTENTION_DIM[family]
    return ImagePrompt(
        vectors=2 * drawn(3, width, seed=1),
        texts=drawn(3, 77, width, seed=2),
        ends=torch.tensor(ends),
        text_of=torch.arange(3),
        pooled=drawn(3, POOLED_DIM, seed=3) if family == "sdxl" else None,
        alpha=alpha,
    )


@pytest.mark.parametrize(("family", "ends", "keys"), [("sd15", (1, 1, 1), 2), ("sdxl", (1, 4, 9), 10)])
def test_the_short_form_is_the_long_form_in_every_layer(family, ends, keys):
    unet = tiny_unet(family).double()
    program, prompt = UNetProgram(unet), prompts(family, ends)
    layers = [name for name in program.layer_ids if not name.endswith("cross-map")]
    maps = [name for name in program.layer_ids if name.endswith("cross-map")]
    plan = program.plan(features=[*layers, *maps], scores=program.score_ids, noise_pred=True)
    latents, times = drawn(3, 4, 8, 8), torch.tensor([900, 500, 20])
    sizes = torch.tensor([64.0, 64, 0, 0, 64, 64]) if family == "sdxl" else None
    short, outputs, gradients = prompt.states(), [], []
    assert short.states.shape[1] == keys
    for states, bias in ((short.states, short.key_bias), (prompt.embeds, None)):
        states = states.detach().requires_grad_()
        text = plan.encode_text(states, pooled=prompt.pooled, key_bias=bias)
        output = plan.run(latents, times, text, time_ids=sizes)
        total = output.noise_pred.square().sum() + sum(score.sum() for score in output.scores.values())
        outputs.append(output)
        gradients.append(torch.autograd.grad(total, states)[0])
    ours, right = outputs

    def close(value, wanted, name):
        # A sum over 77 keys, in another order, through some thirty layers.
        assert (value - wanted).abs().max() <= 1e-12 * wanted.abs().max(), name

    def gathered(long):
        """Of (B, …, 77) the sums over what one state stands for, (B, …, keys)."""
        rows = []
        for row, end in zip(long, ends, strict=True):
            rest = row[..., end:].sum(-1, keepdim=True)
            blank = rest.new_zeros(*rest.shape[:-1], keys - end - 1)
            rows.append(torch.cat([row[..., :end], rest, blank], dim=-1))
        return torch.stack(rows)

    close(ours.noise_pred, right.noise_pred, "noise_pred")
    for name in layers:
        close(ours.features[name], right.features[name], name)
    for name in maps:
        close(ours.features[name], gathered(right.features[name]), name)
    for name in program.score_ids:
        close(ours.scores[name], right.scores[name], name)
    close(gradients[0], gathered(gradients[1].mT).mT, "gradient")
    added = None if sizes is None else {"text_embeds": prompt.pooled, "time_ids": sizes.double().expand(3, -1)}
    with torch.no_grad():
        stock = unet(latents, times, prompt.embeds, added_cond_kwargs=added).sample
    # diffusers computes the embedding of the time in float32.
    assert (ours.noise_pred - stock).abs().max() <= 1e-5 * stock.abs().max()


def test_states_stand_where_the_method_says():
    ends, alpha = (1, 5, 20), 0.6
    for factor in (alpha, 0.0):
        prompt = prompts("sd15", ends, factor)
        for row, end in enumerate(ends):
            for place in range(77):
                text = prompt.texts[row, place]
                wanted = text if place < end else prompt.vectors[row] + factor * text
                assert torch.equal(prompt.embeds[row, place], wanted)
    assert prompts("sd15", ends, alpha).states().counts is None
    assert prompts("sd15", ends).states().counts.sum(1).tolist() == [77] * 3
