"""Deep prompts against a stock encoder that hooks put them into, and the official names."""

import pytest
import torch

from dsd_fast.image_prompt.deep_prompts import DeepPrompts, PromptedVision
from tests.tiny import tiny_clip

TOKENS = 3


@pytest.fixture
def vision():
    return tiny_clip().vision_model.double()


@pytest.fixture
def prompts(vision):
    made = DeepPrompts.drawn(vision, TOKENS, 1).double()
    with torch.no_grad():
        made.prompt_norm.weight.mul_(1.5)
        made.prompt_norm.bias.add_(0.1)
    return made


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def hooked(vision, prompts, pixels):
    """The stock encoder's own pass, whose layers are given other inputs."""
    handles = []

    def around(number):
        def change(module, args, kwargs):
            states = kwargs.pop("hidden_states", None)
            states, *rest = (states, *args) if states is not None else args
            own = torch.nn.functional.linear(
                prompts.deep_prompt_embeddings[number], prompts.prompt_proj.weight, prompts.prompt_proj.bias
            )
            skip = 1 + TOKENS if number or prompts.replace_first else 1
            states = torch.cat([states[:, :1], own.expand(len(states), -1, -1), states[:, skip:]], 1)
            return (states, *rest), kwargs

        return change

    for number, layer in enumerate(vision.encoder.layers):
        handles.append(layer.register_forward_pre_hook(around(number), with_kwargs=True))
    handles.append(vision.post_layernorm.register_forward_pre_hook(lambda _, args: (prompts.prompt_norm(args[0]),)))
    try:
        return vision(pixel_values=pixels).pooler_output
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("first", [False, True], ids=["inserted", "replacing"])
def test_the_encoder_is_the_stock_one_with_tokens_put_in(vision, prompts, pixels, first):
    prompts.replace_first = first
    prompts.requires_grad_(True)
    plain = vision(pixel_values=pixels).pooler_output
    tower = PromptedVision(vision, prompts)
    found, right = tower(pixels).pooler_output, hooked(vision, prompts, pixels)
    # float64; the stock encoder hands its layers the same numbers.
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
    assert (found - plain).abs().max() > 1e-2
    slopes = [torch.autograd.grad(each.square().sum(), list(prompts.parameters())) for each in (found, right)]
    for own, theirs in zip(*slopes, strict=True):
        assert own.abs().max() > 0
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)
    # The encoder itself stays as it was.
    assert all(p.grad is None for p in vision.parameters())
    torch.testing.assert_close(vision(pixel_values=pixels).pooler_output, plain, rtol=0, atol=0)


def test_the_first_values_are_drawn_as_officially(vision):
    made, again = (DeepPrompts.drawn(vision, 50, 7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    bound = (6 / (3 * 16 + 24)) ** 0.5
    assert 0.99 * bound < made.deep_prompt_embeddings.abs().max() <= bound
    # 576 numbers of deviation (2/24)^½: their own deviation is within 4 / (2 · 576)^½.
    assert made.prompt_proj.weight.std() == pytest.approx((2 / 24) ** 0.5, rel=0.12)


def test_released_values_are_read_by_their_names(vision, prompts, pixels):
    released = {f"vision_model.encoder.{name}": value for name, value in prompts.state_dict().items()}
    released["vision_model.post_layernorm.weight"] = torch.zeros(24)
    read = DeepPrompts.of(released, vision, "file", replace_first=True)
    assert (read.tokens, read.replace_first) == (TOKENS, True)
    prompts.replace_first = True
    found, right = (PromptedVision(vision, each)(pixels).pooler_output for each in (read, prompts))
    assert torch.equal(found, right)
    name = "vision_model.encoder.prompt_norm.bias"
    with pytest.raises(ValueError, match="file has no prompt_norm"):
        DeepPrompts.of({key: value for key, value in released.items() if key != name}, vision, "file")
    with pytest.raises(ValueError, match=r"file: prompt_norm.bias is of \(23,\), expected finite numbers of \(24,\)"):
        DeepPrompts.of({**released, name: torch.zeros(23)}, vision, "file")
    with pytest.raises(ValueError, match="expected finite numbers"):
        DeepPrompts.of({**released, name: torch.full((24,), torch.nan)}, vision, "file")
