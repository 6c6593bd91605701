"""The official call: its values, its arguments, and each of its defects under a name of its own."""

import inspect
import json
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dsd_fast as dsd
from dsd_fast.compat import DSDPipeline
from dsd_fast.compat.inputs import Texts
from dsd_fast.compat.scores import combined
from dsd_fast.diffusion import noise
from dsd_fast.matching.score import PairScorer
from dsd_fast.models import PromptStates
from dsd_fast.reference import matching as reference
from tests.compat.pairs import PROMPTS, TIMES, arrays, errors, images, noised, official, states
from tests.matching.test_matcher import Counted
from tests.tiny import FAMILIES, tiny_pipeline, tiny_scheduler

DATA = Path(__file__).parents[1] / "data/sd15like"

# A difference of two float32 norms of about 32, each off by at most 3e-5 on either side.
NEAR = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def stock():
    return tiny_pipeline("sd15")


@pytest.fixture(scope="module")
def pipe(stock):
    return DSDPipeline(dsd.from_pipeline(stock))


OFFICIAL_SIGNATURE = {
    "prompt": None,
    "image": None,
    "strength": 0.8,
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "negative_prompt": None,
    "num_images_per_prompt": 1,
    "eta": 0.0,
    "generator": None,
    "prompt_embeds": None,
    "negative_prompt_embeds": None,
    "output_type": "pil",
    "return_dict": True,
    "callback": None,
    "callback_steps": 1,
    "cross_attention_kwargs": None,
    "sampling_steps": 1000,
    "use_bias": True,
    "layer_mask": None,
    "unconditional": True,
    "ublock": None,
    "sampled_timestep": None,
    "level": None,
    "block": None,
    "attn": None,
    "tfblock": None,
    "ensembling": True,
}


def test_signature_is_the_official_one_and_defects_are_off():
    parameters = list(inspect.signature(DSDPipeline.__call__).parameters.values())[1:]
    ours = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    theirs = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in theirs] == list(OFFICIAL_SIGNATURE.items())
    assert {p.name: p.default for p in ours} == {
        "seed": 0,
        "unconditional_attention": True,
        "batch_mean": False,
        "sample_posterior": False,
        "renormalize_nonnegative": False,
        "half_precision_sums": False,
        "compare_noise_with_v": False,
    }


@pytest.mark.parametrize(("family", "use_bias"), [*((family, True) for family in FAMILIES), ("sd15", False)], ids=str)
@pytest.mark.newest
def test_scores_equal_the_reference(family, use_bias):
    stock = tiny_pipeline(family)
    pipe = DSDPipeline(dsd.from_pipeline(stock))
    pixels = images(3, pipe.model.image_size[0])
    got = pipe(prompt=PROMPTS, image=pixels, guidance_scale=0, sampling_steps=3, use_bias=use_bias, seed=5)
    assert got.shape == (3,)
    assert got.dtype == torch.float32
    want = official(stock, pixels, timesteps=3, noise_weight=use_bias, seed=5)
    torch.testing.assert_close(got, want, **NEAR)
    # The defaults are those of the official call: the guidance scale plays no part.
    again = pipe(prompt=PROMPTS, image=pixels, sampling_steps=3, use_bias=use_bias, seed=5)
    assert torch.equal(got, again)


@pytest.fixture(scope="module")
def oracle(stock):
    """A pipeline on the UNet of the official numbers, and these."""
    stock = tiny_pipeline("sd15")
    stock.unet = diffusers.UNet2DConditionModel.from_config(json.loads((DATA / "config.json").read_text())).eval()
    stock.unet.load_state_dict(load_file(DATA / "diffusion_pytorch_model.safetensors"))
    return stock, load_file(DATA / "dsd_scores.safetensors")


@pytest.mark.parametrize("t", [1, 261, 801])
@pytest.mark.parametrize("part", ["all", "down", "mid", "up"])
def test_attention_equals_official_numbers(oracle, t, part):
    stock, numbers = oracle
    pipe, pixels = DSDPipeline(dsd.from_pipeline(stock)), images(1)
    clean = pipe.model.encode_images(pixels).detach()
    alpha = stock.scheduler.alphas_cumprod[t]
    got = []
    for b in range(4):
        # The noise that takes the image's latent to the one that the official code was given.
        pipe.noise_samples = (numbers["latents"][b] - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        got.append(
            pipe(
                prompt_embeds=numbers["cond"][b : b + 1],
                negative_prompt_embeds=numbers["uncond"],
                image=pixels,
                sampled_timestep=t,
                use_bias=False,
                ublock=None if part == "all" else part,
            )
        )
    torch.testing.assert_close(torch.cat(got), numbers[f"t{t}.{part}.bias0"], **NEAR)


@pytest.mark.parametrize("t", [1, 261, 801])
def test_both_terms_equal_official_numbers(oracle, t):
    stock, numbers = oracle
    model = dsd.from_pipeline(stock)
    scorer = PairScorer.of(model, dsd.MatchConfig(timesteps=[t]))
    alpha = model.schedule.alphas_cumprod[t].float()

    def prompts(rows):
        return PromptStates(rows, None, torch.full((len(rows),), 77), torch.zeros(len(rows), 77, dtype=torch.int64))

    for b in range(4):
        epsilon = numbers["noise"][b : b + 1]
        clean = (numbers["latents"][b : b + 1] - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
        text = Texts(prompts(numbers["cond"][b : b + 1]), torch.zeros(1, dtype=torch.int64))
        found = scorer.begin(
            clean, scorer.texts(text.states, prompts(numbers["uncond"])), text.of, text.of, epsilon=epsilon
        ).done()
        got = combined(found, use_bias=True, free_attention=True, batch_mean=False, dtype=torch.float64)
        assert float(got) == pytest.approx(float(numbers[f"t{t}.all.bias1"][b]), abs=1e-4)


@pytest.mark.parametrize("use_bias", [True, False])
def test_batch_mean(stock, pipe, use_bias):
    """Trap 1, and the shape of trap 3."""
    pixels, prompt = images(3), PROMPTS[0]
    got = pipe(prompt=[prompt] * 3, image=pixels, sampled_timestep=TIMES, use_bias=use_bias, batch_mean=True)
    want = reference.score(stock, arrays(pixels), [prompt], timesteps=TIMES, noise_weight=use_bias, batch_mean=True)[
        :, 0
    ]
    right = pipe(prompt=[prompt] * 3, image=pixels, sampled_timestep=TIMES, use_bias=use_bias)
    assert right.shape == (3,)
    if use_bias:
        torch.testing.assert_close(got, want, **NEAR)
        assert float((got - right).abs().min()) > 1e-3
    else:
        assert got.shape == (1,)
        torch.testing.assert_close(got.expand(3), want, **NEAR)
        torch.testing.assert_close(got[0], right.mean(), **NEAR)


def test_half_precision_sums(stock, pipe):
    """Trap 2: norms in steps of 1/32 and more, so that texts tie."""
    pixels, t = images(1), 500
    options = {"image": pixels, "sampled_timestep": t}
    latents, epsilon = noised(stock, pixels, t, 0)
    prompts = [f"a cat number {n}" for n in range(24)]
    want, gains = [], []
    for prompt in prompts:
        with torch.no_grad():
            a, _ = reference.pair_terms(stock.unet, latents, t, epsilon, states(stock, ""), states(stock, prompt))
        free, bound = (errors(stock, pixels, text, t, 0).half() for text in ("", prompt))
        gains.append(float(free - bound))
        want.append(a.half() + (free - bound))
    got = pipe(prompt=prompts, half_precision_sums=True, **options)
    assert got.dtype == torch.float16
    # Float32 values at the edge between two float16 ones may fall to either side: a step of the norms.
    step = 2.0**-5
    different = (got - torch.cat(want)).abs()
    assert float(different.max()) <= 2 * step
    assert int((different > 0).sum()) <= 2
    assert all(gain % step == 0 for gain in gains)
    right = pipe(prompt=prompts, **options)
    assert len(right.unique()) == len(prompts)
    assert len(got.unique()) < len(prompts)


@pytest.mark.parametrize("kind", ["global", "one", "each"])
def test_sample_posterior(stock, pipe, kind):
    """Trap 9: a sample for every image at every timestep, in that order of draws."""
    pixels = images(3)

    def generators():
        if kind == "global":
            torch.manual_seed(3)
            return None
        if kind == "one":
            return torch.Generator().manual_seed(3)
        return [torch.Generator().manual_seed(n) for n in range(3)]

    generator = generators()
    totals = torch.zeros(3)
    for k, t in enumerate(TIMES):
        with torch.no_grad():
            posterior = stock.vae.encode(pixels).latent_dist
            if kind == "each":
                rows = [stock.vae.encode(pixels[b : b + 1]).latent_dist.sample(generator[b]) for b in range(3)]
                latents = torch.cat(rows)
            else:
                latents = posterior.sample(generator)
        latents = latents * stock.vae.config.scaling_factor
        one = noise(0, k, (4, 16, 16))[None]
        for b, prompt in enumerate(PROMPTS):
            own = {"latents": latents[b : b + 1], "noise": one}
            totals[b] += reference.score(stock, [], [prompt], timesteps=[t], **own)[0, 0]
    options = {"prompt": PROMPTS, "image": pixels, "sampled_timestep": TIMES}
    got = pipe(**options, sample_posterior=True, generator=generators())
    torch.testing.assert_close(got, totals / len(TIMES), **NEAR)
    assert float((got - pipe(**options)).abs().max()) > 1e-2
    with pytest.raises(ValueError, match="generator: samples the posterior"):
        pipe(**options, generator=torch.Generator())
    with pytest.raises(ValueError, match="generator: got 2, expected one, or one for each of 3"):
        pipe(**options, sample_posterior=True, generator=[torch.Generator()] * 2)


def test_renormalize_nonnegative(stock, pipe):
    """Trap 8: a bright image in [−1, 1] is mapped a second time."""
    bright = images(3).abs()
    options = {"prompt": PROMPTS, "sampled_timestep": TIMES}
    twice = pipe(image=bright, renormalize_nonnegative=True, **options)
    torch.testing.assert_close(twice, official(stock, 2 * bright - 1), **NEAR)
    with pytest.warns(UserWarning, match=r"image: no value is below 0\. Tensors are in \[-1, 1\]"):
        once = pipe(image=bright, **options)
    torch.testing.assert_close(once, official(stock, bright), rtol=0, atol=1e-3)
    assert float((once - twice).abs().min()) > 1e-2
    # One value below 0 in the batch and the official code leaves all of it.
    bright[2, 0, 0, 0] = -1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pipe(image=bright, renormalize_nonnegative=True, **options), pipe(image=bright, **options))


def test_compare_noise_with_v():
    """Trap 10: on a v-prediction model the official norms compare the noise with v."""
    stock = tiny_pipeline("sd15", prediction_type="v_prediction")
    pipe, pixels = DSDPipeline(dsd.from_pipeline(stock)), images(3)
    options = {"prompt": PROMPTS, "image": pixels, "sampled_timestep": TIMES}
    right = pipe(**options)
    torch.testing.assert_close(right, official(stock, pixels), **NEAR)
    bias = torch.zeros(3)
    for b, prompt in enumerate(PROMPTS):
        for k, t in enumerate(TIMES):
            free, bound = (errors(stock, pixels[b : b + 1], text, t, k) for text in ("", prompt))
            bias[b] += (free - bound)[0] / len(TIMES)
    wrong = pipe(**options, compare_noise_with_v=True)
    torch.testing.assert_close(wrong, official(stock, pixels, noise_weight=0) + bias, **NEAR)
    assert float((wrong - right).abs().max()) > 1e-2
    with pytest.raises(ValueError, match="compare_noise_with_v: the model's prediction_type is 'epsilon'"):
        DSDPipeline(dsd.from_pipeline(tiny_pipeline("sd15")))(**options, compare_noise_with_v=True)


def test_unconditional_row(stock, pipe):
    """Trap 13: the unconditional row is in the official attention term, and can be left out of it."""
    pixels = images(3)
    options = {"prompt": PROMPTS, "image": pixels, "sampled_timestep": TIMES}
    both = official(stock, pixels, noise_weight=0)
    free = reference.score(stock, arrays(pixels), [""], timesteps=TIMES, noise_weight=0)[:, 0]
    alone = pipe(**options, unconditional=False, guidance_scale=0, use_bias=False)
    torch.testing.assert_close(alone, 2 * both - free, **NEAR)
    without = pipe(**options, unconditional_attention=False)
    torch.testing.assert_close(without, official(stock, pixels) - free / 2, **NEAR)
    # As in the official code, a guidance scale above 1 brings the row back.
    torch.testing.assert_close(pipe(**options, unconditional=False), official(stock, pixels), **NEAR)
    for name, change in (
        ("use_bias", {}),
        ("unconditional_attention", {"use_bias": False, "unconditional_attention": False}),
        ("negative_prompt", {"use_bias": False, "negative_prompt": "x"}),
    ):
        with pytest.raises(ValueError, match=f"^{name}: .*unconditional"):
            pipe(**options, unconditional=False, guidance_scale=1, **change)


def test_timesteps_apart_and_given(stock, pipe):
    pixels = images(3)
    want = torch.stack(
        [official(stock, pixels, timesteps=[t], noise=noise(0, k, (4, 16, 16))[None]) for k, t in enumerate(TIMES)], 1
    )
    options = {"prompt": PROMPTS, "image": pixels}
    apart = pipe(**options, sampled_timestep=TIMES, ensembling=False)
    torch.testing.assert_close(apart, want, **NEAR)
    torch.testing.assert_close(pipe(**options, sampled_timestep=TIMES), want.mean(1), **NEAR)
    torch.testing.assert_close(pipe(**options, sampled_timestep=TIMES[0]), want[:, 0], **NEAR)
    grid = pipe(**options, sampling_steps=3, ensembling=False)
    assert grid.shape == (3, len(reference.official_timesteps(3)))


def test_negative_prompts_take_the_unconditional_rows_place(stock, pipe):
    pixels, t = images(3), 500
    negatives = ["a dog", "", "a dog"]
    want = []
    for b, (prompt, negative) in enumerate(zip(PROMPTS, negatives, strict=True)):
        latents, epsilon = noised(stock, pixels[b : b + 1], t, 0)
        with torch.no_grad():
            texts = (states(stock, negative), states(stock, prompt))
            want.append(sum(reference.pair_terms(stock.unet, latents, t, epsilon, *texts)))
    options = {"image": pixels, "sampled_timestep": t}
    got = pipe(prompt=PROMPTS, negative_prompt=negatives, **options)
    torch.testing.assert_close(got, torch.cat(want), **NEAR)
    with torch.no_grad():
        embeds, free = (torch.cat([states(stock, text) for text in texts]) for texts in (PROMPTS, negatives))
    torch.testing.assert_close(pipe(prompt_embeds=embeds, negative_prompt_embeds=free, **options), got, **NEAR)
    one = pipe(prompt=PROMPTS, negative_prompt="a dog", **options)
    torch.testing.assert_close(one[[0, 2]], got[[0, 2]], **NEAR)
    # One for all may stand in a list or a batch of one.
    assert torch.equal(pipe(prompt=PROMPTS, negative_prompt=["a dog"], **options), one)
    torch.testing.assert_close(pipe(prompt_embeds=embeds, negative_prompt_embeds=free[:1], **options), one, **NEAR)


def test_embeds_of_another_length_need_an_unconditional_text_of_that_length(stock, pipe):
    with torch.no_grad():
        text, free = (states(stock, prompt)[:, :10] for prompt in (PROMPTS[0], ""))
        latents, epsilon = noised(stock, images(1), 500, 0)
        want = sum(reference.pair_terms(stock.unet, latents, 500, epsilon, free, text))
    options = {"image": images(1), "sampled_timestep": 500}
    torch.testing.assert_close(pipe(prompt_embeds=text, negative_prompt_embeds=free, **options), want, **NEAR)
    with Counted(stock) as seen, pytest.raises(ValueError, match="prompt_embeds: got 10 tokens"):
        pipe(prompt_embeds=text, **options)
    assert seen["vae"] == 0
    # Without an unconditional row there is nothing to differ from.
    alone = pipe(prompt_embeds=text, unconditional=False, guidance_scale=0, use_bias=False, **options)
    assert alone.isfinite().all()


def test_kinds_of_images_and_fewer_images_than_prompts(stock, pipe, tmp_path):
    pixels = images(2)
    prompts = ["a", "b", "c", "d"]
    both = arrays(pixels)
    want = torch.cat([reference.score(stock, [both[b % 2]], [prompts[b]], timesteps=TIMES)[0] for b in range(4)])
    pictures = [Image.fromarray(array) for array in arrays(pixels)]
    files = [tmp_path / f"{n}.png" for n in range(2)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    for given in (pixels, pixels.half(), list(pixels), [pixels[:1], pixels[1:]], pictures, files, arrays(pixels)):
        got = pipe(prompt=prompts, image=given, sampled_timestep=TIMES)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-2 if given is not pixels else 1e-4)
    one = pipe(prompt=prompts[0], image=pixels[0], sampled_timestep=TIMES)
    torch.testing.assert_close(one, want[:1], **NEAR)
    large = pictures[0].resize((200, 90))
    torch.testing.assert_close(
        pipe(prompt="a", image=large, sampled_timestep=TIMES),
        reference.score(stock, [large], ["a"], timesteps=TIMES)[0],
        **NEAR,
    )
    # A tensor keeps its size, which the official code's noise of one size does not allow.
    assert pipe(prompt="a", image=images(1)[..., :48], sampled_timestep=TIMES).isfinite().all()


def test_each_thing_is_computed_once(stock, pipe, monkeypatch):
    """Four pairs of two images and two texts, equal ones recognised by their content."""
    pixels, prompts, steps = images(2)[[0, 1, 0, 1]].clone(), ["a cat", "a cat", "a dog", "a dog"], len(TIMES)
    options = {"prompt": prompts, "image": pixels, "sampled_timestep": TIMES}
    with Counted(stock) as seen:
        whole = pipe(**options)
    assert seen == {
        "shared": 2 * steps,
        "text-dependent": (4 + 2) * steps,
        "unet out": (4 + 2) * steps,
        "keys": 2 + 1,
        "vae": 2,
        "text encoder": 2 + 1,
    }
    monkeypatch.setattr("dsd_fast.engine.engine._LATENT_BYTES", 1)
    with Counted(stock) as seen:
        torch.testing.assert_close(pipe(**options), whole, rtol=1e-5, atol=1e-5)
    assert seen["vae"] == 2
    assert seen["shared"] == 2 * steps


def test_noise_samples_replace_the_seeds_noise(stock, pipe, monkeypatch):
    pixels, bank = images(3), torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(pipe, "noise_samples", bank)
    got = pipe(prompt=PROMPTS, image=pixels, sampled_timestep=TIMES)
    torch.testing.assert_close(got, official(stock, pixels, noise=bank[:2]), **NEAR)
    monkeypatch.setattr(pipe, "noise_samples", bank[:1])
    with pytest.raises(
        ValueError, match=r"noise_samples: has shape \(1, 4, 16, 16\), expected \(2 or more, 4, 16, 16\)"
    ):
        pipe(prompt=PROMPTS, image=pixels, sampled_timestep=TIMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt, prompt_embeds: expected one of them"),
        ({"prompt": ["a", 3]}, "prompt: got 2 values, expected a string or a list of strings"),
        ({"prompt": "dog " * 80}, "prompt: prompts.0. has 82 tokens, expected at most 77"),
        ({"prompt": ["a"] * 4}, "image: got 3 for 4 prompts"),
        ({"image": None}, "image: got none"),
        ({"image": "dog.png"}, "image: got str"),
        ({"image": [np.zeros((8, 8, 3))]}, r"image\[0\]: got an array of float64"),
        ({"image": [torch.zeros(3, 64, 64), torch.zeros(3, 32, 32)]}, "image: got tensors of shapes"),
        ({"image": torch.zeros(3, 4, 64, 64)}, r"image: got shape \(3, 4, 64, 64\), expected"),
        ({"image": torch.zeros(3, 3, 63, 64)}, r"image: got shape \(3, 3, 63, 64\), .* multiples of 4"),
        ({"image": torch.zeros(3, 3, 64, 64, dtype=torch.uint8)}, "image: got a tensor of torch.uint8"),
        ({"image": 255 * torch.rand(3, 3, 64, 64)}, "image: spans .* expected -1 to 1"),
        ({"sampling_steps": 0}, "sampling_steps is 0, expected 1 to 1000"),
        ({"sampled_timestep": [5, 1000]}, "sampled_timestep: timesteps holds 1000"),
        ({"strength": 1.5}, "strength: got 1.5, expected 0 to 1"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"num_inference_steps": 900, "strength": 0}, "num_inference_steps, strength: leave out 900 timesteps"),
        ({"seed": -1}, "seed: got -1"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt: got 2, which has no effect on a score"),
        ({"callback": print}, "callback: got .*, which has no effect on a score"),
        ({"negative_prompt": ["a"] * 2}, "negative_prompt: got 2, expected one, or one for each of 3 prompts"),
        ({"negative_prompt_embeds": torch.zeros(1, 10, 24)}, "negative_prompt_embeds: got 10 tokens, expected 77 as"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(3, 10, 24)},
            "prompt_embeds: got 10 tokens, expected 77 as in the .* give negative_prompt_embeds of 10 tokens too",
        ),
        (
            {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(3, 77, 24)},
            "negative_prompt, negative_prompt_e",
        ),
        ({"prompt": None, "prompt_embeds": torch.zeros(3, 77, 25)}, r"prompt_embeds: got shape \(3, 77, 25\)"),
    ],
)
def test_bad_arguments_are_named(pipe, change, message):
    arguments = {"prompt": PROMPTS, "image": images(3), **change}
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_a_given_scheduler_counts(stock):
    betas = {"num_train_timesteps": 500, "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    pipe = DSDPipeline(dsd.from_pipeline(stock), scheduler=diffusers.EulerDiscreteScheduler(**betas))
    pixels = images(3)
    other = tiny_pipeline("sd15")
    other.scheduler = diffusers.DDPMScheduler(**betas)
    options = {"prompt": PROMPTS, "image": pixels, "sampled_timestep": [40, 300]}
    want = official(other, pixels, timesteps=[40, 300])
    torch.testing.assert_close(pipe(**options), want, **NEAR)
    pipe.scheduler = tiny_scheduler("sd15")
    assert pipe.scheduler.config.num_train_timesteps == 1000
    assert float((pipe(**options) - want).abs().max()) > 1e-2
    # Changed in place it counts at the next call.
    for given in (pipe, other):
        given.scheduler = diffusers.DDPMScheduler(**betas)
        given.scheduler.alphas_cumprod = given.scheduler.alphas_cumprod**2
    want = official(other, pixels, timesteps=[40, 300])
    torch.testing.assert_close(pipe(**options), want, **NEAR)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("ddim", "scheduler: got str, expected a diffusers scheduler"),
        (diffusers.HeunDiscreteScheduler(), "scheduler: HeunDiscreteScheduler has order 2, expected 1"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "scheduler: .*FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_refused(stock, scheduler, message):
    with pytest.raises(ValueError, match=message):
        DSDPipeline(dsd.from_pipeline(stock), scheduler=scheduler)


def test_a_scheduler_with_fewer_timesteps_is_refused(stock):
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(20)
    with pytest.raises(ValueError, match=r"scheduler: set_timesteps\(20\) was called on it, expected all 1000"):
        DSDPipeline(dsd.from_pipeline(stock), scheduler=scheduler)


def test_from_pretrained(tmp_path, stock):
    stock.save_pretrained(tmp_path)
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    pipe = DSDPipeline.from_pretrained(tmp_path, scheduler=scheduler, torch_dtype=torch.float32, local_files_only=True)
    assert pipe.scheduler is scheduler
    pixels = images(3)
    options = {"prompt": PROMPTS, "image": pixels, "sampled_timestep": TIMES}
    torch.testing.assert_close(pipe(**options), official(stock, pixels), **NEAR)
    assert isinstance(pipe.unet, diffusers.UNet2DConditionModel)
    assert isinstance(pipe.vae, diffusers.AutoencoderKL)
    assert type(pipe.text_encoder).__name__ == "CLIPTextModel"
    assert pipe.tokenizer("a")["input_ids"]
    assert pipe.vae_scale_factor == 4
    assert (pipe.device.type, pipe.dtype) == ("cpu", torch.float32)
    assert pipe.to(torch.bfloat16) is pipe
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    assert pipe.to("cpu", torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match=r"nowhere/to-be-found"):
        DSDPipeline.from_pretrained("nowhere/to-be-found", revision="abc", local_files_only=True)
    with pytest.raises(ValueError, match=r"model: got StableDiffusionPipeline, expected one from dsd_fast\.load"):
        DSDPipeline(stock)


def test_the_embedded_model():
    pipe = DSDPipeline.from_pretrained("mini")
    got = pipe(prompt=PROMPTS, image=images(3), sampling_steps=3)
    want = dsd.Matcher(pipe.model, dsd.MatchConfig(timesteps=3, official=True)).score(arrays(images(3)), PROMPTS)
    torch.testing.assert_close(got, want.diagonal(), **NEAR)
