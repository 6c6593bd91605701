"""The judge of generation is the stock pipeline's own call."""

import inspect

import diffusers
import pytest
import torch

from dsd_fast.reference import generation
from tests.tiny import tiny_pipeline


@pytest.mark.parametrize("noise", ["diffusers", "dsd_fast"])
def test_it_is_the_pipelines_own_call(noise):
    pipe = tiny_pipeline("sd15")
    ancestral = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    before = dict(vars(pipe))
    rows = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    options = {"steps": 3, "guidance": 4.0, "negative_prompt": "cat", "scheduler": ancestral, "noise": noise}
    got = generation.generate(pipe, ["a dog", "a cat"], [3, 2**64 - 1], **options, batch_size=1, latents=True)
    assert rows == [2] * 6
    assert dict(vars(pipe)) == before
    assert "step" not in vars(ancestral)

    def seeded(draw):
        words = [3, 2**64 - 1]
        return [
            torch.Generator().manual_seed(seed) if noise == "diffusers" else generation._generator(seed, draw)
            for seed in words
        ]

    generators = seeded(1)
    start = torch.cat([torch.randn(1, 4, 16, 16, generator=each) for each in seeded(0)])
    if noise == "diffusers":
        start = None
    pipe.scheduler = ancestral
    pipe.set_progress_bar_config(disable=True)

    def seed_again(pipe, step, t, kwargs):
        if noise == "dsd_fast":
            for generator, other in zip(generators, seeded(2 + step), strict=True):
                generator.set_state(other.get_state())
        return kwargs

    expected = pipe(
        ["a dog", "a cat"],
        negative_prompt=["cat", "cat"],
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=generators,
        latents=start,
        callback_on_step_end=seed_again,
        output_type="latent",
    ).images
    # Two rows together or one after the other.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    pictures = generation.generate(pipe, ["a dog"], [3], **{**options, "steps": 1})
    assert [each.size for each in pictures] == [(64, 64)]


def test_signature_is_the_contract():
    parameters = inspect.signature(generation.generate).parameters
    assert list(parameters)[:3] == ["pipe", "prompts", "seeds"]
    defaults = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    config = ("steps", "guidance", "guidance_rescale", "strength", "negative_prompt", "clip_skip", "eta", "noise")
    assert [defaults[name] for name in config] == [50, 7.5, 0.0, 0.8, None, None, 0.0, "dsd_fast"]
